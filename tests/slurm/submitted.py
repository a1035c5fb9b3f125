"""Runs submitted to the test cluster: what they are asked, and what is done to them."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.slurm import held_reward
from tests.slurm.cluster import job_details, run, wait_for

REPOSITORY = Path(__file__).parents[2]
UNTIMED = ("time/", "throughput/", "memory/")
NEVER_S = 900.0  # only a hang waits this long
ASK_SLURM_EVERY = 10  # looks at a run's files: a program of SLURM's takes the jobs' processor time
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


@dataclass(frozen=True)
class Submitted:
    """A run that was submitted."""

    directory: Path
    job: str
    hold: Path

    @property
    def state(self) -> str:
        return job_details(self.job)["JobState"]

    def lines(self) -> list[dict[str, Any]]:
        """The run's metrics, but for what no two runs share."""
        file = self.directory / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [{name: value for name, value in line.items() if not name.startswith(UNTIMED)} for line in lines]

    def events(self) -> list[str]:
        """What happened to the run, from the batch script's notes."""
        return [line.split()[3] for line in (self.directory / "slurm/attempts.txt").read_text().splitlines()]

    def log(self, restart: int | None = None) -> str:
        """What an attempt said; by default all of them."""
        pattern = "job_*_restart_*.log" if restart is None else f"job_*_restart_{restart}.log"
        return "\n".join(path.read_text() for path in sorted((self.directory / "slurm").glob(pattern)))

    def newest_checkpoint(self) -> int:
        return max((int(path.name[5:]) for path in (self.directory / "checkpoints").glob("step_*")), default=0)

    def hold_after(self, step: int) -> None:
        """Have the run wait in the step after `step`."""
        hold_after(self.hold, self.directory, step)

    def release(self) -> None:
        """Let it go on to its end."""
        self.hold.unlink()

    def wait_until_held(self, after: int) -> None:
        """Wait until the line of step `after` is written: the run is then held in the next one."""

        def reached() -> bool:
            return bool(lines := self.lines()) and lines[-1]["step"] >= after

        self.wait_while_it_lives(reached, f"step {after}")

    def wait_until_it_says(self, words: str) -> None:
        """Wait for `words` in the logs of its attempts."""
        self.wait_while_it_lives(lambda: words in self.log(), repr(words))

    def wait_while_it_lives(self, condition, what: str) -> None:
        """Wait for what only a job that is not over brings about."""

        looks = 0

        def is_so() -> bool:
            nonlocal looks
            looks += 1
            over = looks % ASK_SLURM_EVERY == 0 and self.state in OVER
            holds = condition()
            assert holds or not over, f"no {what}: {self.log()}"
            return holds

        wait_for(is_so, f"{what} of {self.directory.name}", NEVER_S, every_s=0.2)

    def wait_for_end(self, state: str) -> None:
        """Wait until the job is over, which must be as `state` says."""
        wait_for(lambda: self.state in OVER, f"job {self.job} to end", NEVER_S, every_s=0.5)
        assert self.state == state, self.log()

    def wait_for_requeue(self) -> None:
        """Wait until the job is in the queue again."""
        wait_for(lambda: self.state == "PENDING", f"job {self.job} to be requeued", NEVER_S, every_s=0.5)

    def go_on_by_hand(self, **environment: str) -> "Submitted":
        """Submit the run's script as a person does who has mended what stopped it."""
        script = str(self.directory / "slurm/train.sbatch")
        variables = environment | {held_reward.VARIABLE: str(self.hold)}
        words = [f"{name}={value}" for name, value in variables.items()]
        return Submitted(self.directory, run("env", *words, "sbatch", "--parsable", script).strip(), self.hold)

    def start_again(self) -> None:
        """Start the job soon once it is requeued: SLURM has each wait about two minutes.

        Not in the second in which its last attempt ended: nodes refuse a job whose credential is no newer than that.
        """
        self.wait_for_requeue()
        completing = ("squeue", "-h", "--states=completing", "--jobs", self.job)
        wait_for(lambda: not run(*completing), f"job {self.job} to be gone", NEVER_S, every_s=0.5)
        run("scontrol", "update", f"JobId={self.job}", "StartTime=now+2")


def hold_after(hold: Path, directory: Path, step: int) -> None:
    """Have the run in `directory` wait in the step after `step`; of steps 0, 1, ... each has a line of metrics."""
    hold.parent.mkdir(exist_ok=True)
    aside = hold.with_suffix(".new")
    aside.write_text(f"{directory / 'metrics.jsonl'} {step + 1}")
    aside.rename(hold)


def program(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """What the program answers to `arguments`."""
    return subprocess.run(
        [sys.executable, "-m", "megatron_gspo", *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        timeout=NEVER_S,
    )


def hold_of(directory: Path) -> Path:
    """The file by which the run in `directory`, or with a number behind a task of the array there, is held."""
    return directory.parent / "holds" / directory.name


def submit(directory: Path, *arguments: object, hold_at: int | None = None, **environment: str) -> Submitted:
    """Submit a run; it will wait in the step after `hold_at`."""
    hold = hold_of(directory)
    if hold_at is not None:
        hold_after(hold, directory, hold_at)
    environment |= {held_reward.VARIABLE: str(hold)}
    done = program("submit", *arguments, "--output-dir", directory, **environment)
    assert done.returncode == 0, done.stderr
    assert f"Next: megatron-gspo status {directory}" in done.stdout
    found = re.match(r"Submitted job (\d+)", done.stdout)
    assert found is not None, done.stdout
    return Submitted(directory, found[1], hold)
