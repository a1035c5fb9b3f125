"""`megatron-gspo status`: how submitted runs are getting on.

In: a run's directory, a comparison's, a job's id, or nothing for all of this user's jobs. Out: two lines a run, and two for
the job that compares them. What SLURM has forgotten is told from the directory's own files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_gspo.config import read_step_count
from megatron_gspo.report.metrics import read_metrics_file
from megatron_gspo.slurm import scheduler
from megatron_gspo.types import UserError

#: Where a run's job, and the one that draws a comparison, leave their ids; also written by `slurm/*.sbatch`.
RUN_NOTE, COMPARISON_NOTE = Path("slurm/job_id"), Path("slurm/compare_job_id")

WHAT_HAPPENED = {
    "started": "ended unnoticed",  # the whole job was killed, or its node failed
    "done": "done",
    "stopped": "saved, to go on",
    "failed": "failed",
    "ended": "ended from outside",
    "refused": "refused",
    "gave_up": "gave up",
}


@dataclass(frozen=True)
class Attempt:
    """A line of `RUN/slurm/attempts.txt`: the job started the run, or what came of that."""

    job: str
    restart: int
    event: str  # a key of WHAT_HAPPENED
    checkpoint: int  # step of the newest one then; 0 for none


@dataclass(frozen=True)
class RunStatus:
    """What is known of a run."""

    directory: Path
    job_id: str
    state: str
    step: int | None  # None before the first line of metrics
    num_steps: int
    reward: float | None
    restarts: int
    time_left: str | None  # before the time limit, while it runs
    log: Path | None  # of the last attempt; None before the first

    def lines(self) -> list[str]:
        """For a person."""
        parts = [f"{self.directory}", f"job {self.job_id}", self.state]
        parts.append(f"step {self.step if self.step is not None else 0}/{self.num_steps}")
        parts += [] if self.reward is None else [f"reward {self.reward:.3f}"]
        parts.append(f"restarts {self.restarts}")
        parts += [] if self.time_left is None else [f"{self.time_left} left"]
        return ["  ".join(parts), f"    log: {self.log or 'not started yet'}"]


@dataclass(frozen=True)
class ComparisonStatus:
    """What is known of the job that compares the runs of an array."""

    directory: Path
    job_id: str
    state: str
    page: Path | None  # None before it is drawn
    log: Path | None  # None before the job has started

    def lines(self) -> list[str]:
        """For a person."""
        parts = [f"{self.directory}", f"comparison: job {self.job_id}", self.state]
        return [
            "  ".join([*parts, f"page: {self.page or 'not drawn yet'}"]),
            f"    log: {self.log or 'not started yet'}",
        ]


def print_status(target: str | None) -> None:
    """Print the state of one run, of all runs of a comparison and of what draws it, or of all this user's jobs.

    Raises:
        UserError: `target` is neither a directory that was submitted to nor a job of this program's.
    """
    directories = find_submitted(target)
    if not directories:
        print("No jobs of megatron-gspo in SLURM's queue. A finished run: megatron-gspo status RUN")
    for directory in directories:
        status = run_status(directory) if (directory / RUN_NOTE).exists() else comparison_status(directory)
        print("\n".join(status.lines()))


def find_submitted(target: str | None) -> list[Path]:
    """The directories of runs and comparisons meant by `target`.

    Raises:
        UserError: there are none.
    """
    if target is None:
        found = [directory for job in scheduler.jobs_of_this_user() for directory in _directories_of(job)]
        return list(dict.fromkeys(found))
    found = _submitted_below(Path(target).resolve())
    if not found and target.replace("_", "").isdecimal():
        found = [directory for job in scheduler.find_job(target) for directory in _directories_of(job)]
    if not found:
        raise UserError(
            f"{target} is neither a directory that a run was submitted to nor a job of megatron-gspo that SLURM still "
            "knows; accepted: the --output-dir of a submit, or a job's number"
        )
    return list(dict.fromkeys(found))


def run_status(directory: Path) -> RunStatus:
    """What is known of the run in `directory`."""
    job_id = _job_of(directory)
    attempts = read_attempts(directory)
    jobs = scheduler.find_job(job_id)
    state, time_left = "unknown to SLURM", None
    if attempts:
        state = WHAT_HAPPENED[attempts[-1].event]
    if jobs:
        job = jobs[0]
        state = _state_of(job)
        time_left = job.time_left if job.state == "RUNNING" else None
        if attempts and job.state not in ("PENDING", "RUNNING", "COMPLETING"):
            state = f"{job.state} ({WHAT_HAPPENED[attempts[-1].event]})"
    metrics = directory / "metrics.jsonl"
    lines = read_metrics_file(metrics)[0] if metrics.exists() else []
    rewards = [line["reward/mean"] for line in lines if line.get("reward/mean") is not None]
    last = attempts[-1] if attempts else None
    return RunStatus(
        directory=directory,
        job_id=job_id,
        state=state,
        step=int(lines[-1]["step"] or 0) if lines else None,
        num_steps=read_step_count(directory / "slurm" / "recipe.yaml"),
        reward=rewards[-1] if rewards else None,
        restarts=last.restart if last else 0,
        time_left=time_left,
        log=directory / "slurm" / f"job_{last.job}_restart_{last.restart}.log" if last else None,
    )


def comparison_status(directory: Path) -> ComparisonStatus:
    """What is known of the job that compares the runs in `directory`."""
    job_id = _job_of(directory)
    jobs = scheduler.find_job(job_id)
    page, log = directory / "compare.html", directory / "slurm" / f"compare_{job_id}.log"
    forgotten = "done" if page.exists() else "unknown to SLURM"
    return ComparisonStatus(
        directory=directory,
        job_id=job_id,
        state=_state_of(jobs[0]) if jobs else forgotten,
        page=page if page.exists() else None,
        log=log if log.exists() else None,
    )


def read_attempts(directory: Path) -> list[Attempt]:
    """What `train.sbatch` has noted, oldest first; a line that was cut off when its node was lost is none."""
    file = directory / "slurm" / "attempts.txt"
    if not file.exists():
        return []
    attempts = []
    for line in file.read_text().splitlines():
        words = line.split()
        if len(words) == 6:
            _time, job, restart, event, checkpoint, _status = words
            attempts.append(Attempt(job, int(restart), event, int(checkpoint)))
    return attempts


def _submitted_below(directory: Path) -> list[Path]:
    """`directory` where a run was submitted to it; else the runs of the comparison that it is, and itself."""
    runs = sorted(note.parents[1] for pattern in ("", "*/") for note in directory.glob(f"{pattern}{RUN_NOTE}"))
    return [*runs, directory] if (directory / COMPARISON_NOTE).exists() else runs


def _directories_of(job: scheduler.Job) -> list[Path]:
    """A job's run or comparison, where it is one of this program's: told by its script's place, and by its note there."""
    if job.script.name not in ("train.sbatch", "compare.sbatch"):
        return []
    return [directory for directory in _submitted_below(job.script.parents[1]) if _job_of(directory) == job.id]


def _job_of(directory: Path) -> str:
    note = directory / RUN_NOTE
    return (note if note.exists() else directory / COMPARISON_NOTE).read_text().strip()


def _state_of(job: scheduler.Job) -> str:
    return f"{job.state} ({job.reason})" if job.state == "PENDING" else job.state
