"""Runs submitted to a real SLURM: they train, survive what clusters do to jobs, and are refused before they could fail."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.slurm.cluster import Cluster, job_details, run, start_now, wait_for
from tests.tiny_model import tiny_recipe, write_tiny_model

REPOSITORY = Path(__file__).parents[2]
UNTIMED = ("time/", "throughput/", "memory/")
NEVER_S = 900.0  # only a hang waits this long
STEPS = 12


@dataclass(frozen=True)
class Submitted:
    """A run that was submitted."""

    directory: Path
    job: str

    def lines(self) -> list[dict[str, Any]]:
        """The run's metrics, but for what no two runs share."""
        file = self.directory / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [{name: value for name, value in line.items() if not name.startswith(UNTIMED)} for line in lines]

    def wait_for_step(self, step: int) -> None:
        """Wait until the line of a step is written."""

        def reached() -> bool:
            assert self.state in ("PENDING", "RUNNING", "COMPLETING"), self.log()
            return bool(lines := self.lines()) and lines[-1]["step"] >= step

        wait_for(reached, f"step {step}", NEVER_S)

    def wait_for_end(self, state: str) -> None:
        """Wait until the job is over, which must be as `state` says."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        wait_for(lambda: self.state in over, f"job {self.job} to end", NEVER_S)
        assert self.state == state, self.log()

    @property
    def state(self) -> str:
        return job_details(self.job)["JobState"]

    def events(self) -> list[str]:
        """What happened to the run, from the batch script's notes."""
        return [line.split()[3] for line in (self.directory / "slurm/attempts.txt").read_text().splitlines()]

    def log(self, restart: int | None = None) -> str:
        """What an attempt said; by default all of them."""
        pattern = "job_*_restart_*.log" if restart is None else f"job_*_restart_{restart}.log"
        return "\n".join(path.read_text() for path in sorted((self.directory / "slurm").glob(pattern)))

    def newest_checkpoint(self) -> int:
        return max((int(path.name[5:]) for path in (self.directory / "checkpoints").glob("step_*")), default=0)


def program(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_gspo", *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=NEVER_S,
    )


def submit(directory: Path, *arguments: object) -> Submitted:
    done = program("submit", *arguments, "--output-dir", directory)
    assert done.returncode == 0, done.stderr
    assert f"Next: megatron-gspo status {directory}" in done.stdout
    return Submitted(directory, re.match(r"Submitted job (\d+)", done.stdout)[1])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("recipe")
    write_tiny_model(directory / "model")
    text = tiny_recipe(
        directory / "model",
        training={"steps": STEPS, "save_every": 2},
        evaluation={"prompts": 2},
        reward={"name": "tests.end_to_end.length_reward:even_length"},
    )
    (directory / "tiny.yaml").write_text(text)
    return directory / "tiny.yaml"


@dataclass(frozen=True)
class Life:
    """A run on two nodes that was told to save, lost a node, and came to its end; and one that nothing happened to."""

    run: Submitted
    uninterrupted: Submitted  # on one node
    status: str  # printed while the second attempt ran


@pytest.fixture(scope="module")
def life(cluster: Cluster, recipe: Path) -> Life:
    run_ = submit(recipe.parent / "two_nodes", recipe, "parallel.data=2", "--nodes", 2, "--time", "00:30:00")
    run_.wait_for_step(2)
    # As SLURM does before the limit (--signal=B:USR1): to the batch script alone.
    run("scancel", "--batch", "--signal=USR1", run_.job)
    start_now(run_.job)
    stopped_after = run_.newest_checkpoint()
    run_.wait_for_step(stopped_after + 1)
    status = program("status", run_.job).stdout
    lost = run("scontrol", "show", "hostnames", job_details(run_.job)["NodeList"]).split()[1]
    cluster.kill_node(lost)
    uninterrupted = submit(recipe.parent / "one_node", recipe, "--gpus-per-node", 2)
    start_now(run_.job)
    run_.wait_for_end("COMPLETED")
    uninterrupted.wait_for_end("COMPLETED")
    cluster.revive_node(lost)
    return Life(run_, uninterrupted, status)


def test_two_nodes_stopped_requeued_and_bereft_of_a_node_compute_what_one_node_computes_undisturbed(life: Life):
    assert [line["step"] for line in life.run.lines()] == list(range(STEPS + 1))
    assert life.run.lines() == life.uninterrupted.lines()
    assert any(line["grad_norm"] > 0 for line in life.run.lines()[1:])
    exported = [
        one.directory / f"checkpoints/hf_step_{STEPS}/model.safetensors" for one in (life.run, life.uninterrupted)
    ]
    assert exported[0].read_bytes() == exported[1].read_bytes()


def test_the_ranks_of_a_job_are_spread_over_its_nodes(life: Life):
    assert re.search(r"train.sbatch: 2 nodes \(node\[\d-\d\]\), 1 ranks each, after step 0", life.run.log(0))
    assert "1 nodes (node" in life.uninterrupted.log(0)
    assert "2 ranks each" in life.uninterrupted.log(0)


def test_a_job_told_to_save_requeues_itself_and_one_that_loses_a_node_starts_again(life: Life):
    events = life.run.events()
    assert events[:3] == ["started", "stopped", "started"]
    assert events[-2:] == ["started", "done"]
    notes = (life.run.directory / "slurm/attempts.txt").read_text().splitlines()
    assert all(re.fullmatch(r"\S+ \d+ \d (\w+) \d+ (-?\d+|-)", note) for note in notes)
    assert job_details(life.run.job)["Restarts"] == "2"
    assert "asked to save and stop" in life.run.log(0)
    assert "going on from" in life.run.log(1)
    assert "train.sbatch: done" in life.run.log(2)


def test_status_tells_state_step_reward_restarts_time_left_and_log(life: Life):
    first, second = life.status.splitlines()
    assert re.fullmatch(
        rf"{life.run.directory}  job {life.run.job}  RUNNING  step \d+/{STEPS}  reward 0\.\d+  restarts 1  \d+:\d+ left",
        first,
    )
    assert second == f"    log: {life.run.directory}/slurm/job_{life.run.job}_restart_1.log"
    over = program("status", life.run.directory).stdout
    assert f"COMPLETED (done)  step {STEPS}/{STEPS}" in over
    assert "restarts 2" in over


def test_a_run_is_not_submitted_twice(life: Life, recipe: Path):
    done = program("submit", recipe, "--output-dir", life.run.directory)
    assert done.returncode == 2
    assert f"to go on with it: sbatch {life.run.directory}/slurm/train.sbatch" in done.stderr


def test_a_job_out_of_requeues_stays_saved_goes_on_by_hand_and_is_not_requeued_when_cancelled(
    cluster: Cluster, recipe: Path
):
    bounded = submit(recipe.parent / "bounded", recipe, "training.steps=1000", "slurm.max_requeues=0")
    bounded.wait_for_step(1)
    run("scancel", "--batch", "--signal=USR1", bounded.job)
    bounded.wait_for_end("FAILED")
    saved = bounded.newest_checkpoint()
    assert saved >= 1
    assert bounded.events() == ["started", "stopped", "gave_up"]
    script = bounded.directory / "slurm/train.sbatch"
    assert f"slurm.max_requeues is 0: stays as it is. To go on: sbatch {script}" in bounded.log()

    again = Submitted(bounded.directory, run("sbatch", "--parsable", str(script)).strip())
    again.wait_for_step(saved + 1)
    run("scancel", again.job)
    again.wait_for_end("CANCELLED")
    wait_for(lambda: again.events()[-1] == "ended", "the batch script to notice", NEVER_S)
    assert again.newest_checkpoint() > saved
    assert job_details(again.job)["Restarts"] == "0"
    assert again.state == "CANCELLED"


def test_a_job_that_fails_twice_at_the_same_step_stops_and_says_so(cluster: Cluster, recipe: Path):
    failing = submit(recipe.parent / "failing", recipe, "objective.name=tests.slurm.failing_objective:OBJECTIVE")
    failing.wait_for_end("FAILED")
    assert failing.events() == ["started", "failed", "started", "failed", "gave_up"]
    assert "this objective always fails" in failing.log(0)
    assert "failed twice after the checkpoint of step 0 (status 1): not tried again" in failing.log(1)
    assert "FAILED (gave up)" in program("status", failing.directory).stdout


def test_arms_and_seeds_are_an_array_whose_comparison_waits_for_no_more_than_its_end(cluster: Cluster, recipe: Path):
    (recipe.parent / "grpo.yaml").write_text("base: tiny.yaml\nobjective:\n  name: grpo\n")
    output = recipe.parent / "array"
    done = program(
        *("submit", recipe, "training.steps=1", "data.eval=null", "--arms", recipe.parent / "grpo.yaml"),
        *("--seeds", "1,2", "--output-dir", output),
    )
    assert done.returncode == 0, done.stderr
    array, comparison = re.findall(r"Submitted job (\d+)", done.stdout)
    assert job_details(comparison)["Dependency"].startswith(f"afterany:{array}_")
    runs = {f"{arm}_seed_{seed}": (arm, seed) for arm in ("tiny", "grpo") for seed in (1, 2)}
    tasks = [Submitted(output / name, f"{array}_{number}") for number, name in enumerate(runs)]
    for task in tasks:
        task.wait_for_end("COMPLETED")
        assert [line["step"] for line in task.lines()] == [1]
        recipe_of_run = yaml.safe_load((task.directory / "recipe.yaml").read_text())
        arm, seed = runs[task.directory.name]
        assert recipe_of_run["seed"] == seed
        assert recipe_of_run["objective"]["name"] == ("grpo" if arm == "grpo" else "gspo")
    assert len({json.dumps(task.lines()) for task in tasks}) == 4
    assert len(program("status", output).stdout.splitlines()) == 8
    wait_for(lambda: job_details(comparison)["JobState"] in ("COMPLETED", "FAILED"), "the comparison", NEVER_S)
    said = (output / f"slurm/compare_{comparison}.log").read_text()
    directories = " ".join(str(task.directory) for task in tasks)
    assert f"megatron-gspo compare {directories} --output {output}/compare.html" in said
    assert job_details(comparison)["JobState"] == "COMPLETED", said
    assert "<html" in (output / "compare.html").read_text()


REFUSALS = {
    "a partition that is not there": (("--partition", "nosuch"), "invalid partition specified: nosuch"),
    "more GPUs than nodes have": (("--gpus-per-node", 16), "Requested node configuration is not available"),
    "more nodes than there are": (("--nodes", 5, "--gpus-per-node", 1), "(see slurm.nodes"),
    "a time limit above the partition's": (("--time", "99-00:00:00"), "Requested time limit is invalid"),
    "a layout that does not fit": (("--nodes", 3), "accepted: a divisor of the layout's 2 ranks"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_is_refused_before_submission_in_one_line(cluster: Cluster, recipe: Path, tmp_path: Path, what: str):
    options, words = REFUSALS[what]
    queue = run("squeue", "-h", "--states=all")
    sizes = ("parallel.data=2", "training.prompts_per_step=160")
    done = program("submit", recipe, *sizes, *options, "--output-dir", tmp_path / "run")
    assert done.returncode == 2
    assert words in done.stderr
    refusals = [line for line in done.stderr.splitlines() if "is set to that" not in line]
    assert len(refusals) == 1
    assert run("squeue", "-h", "--states=all") == queue
    assert list(tmp_path.iterdir()) == []


def test_an_output_directory_that_cannot_be_written_is_refused(cluster: Cluster, recipe: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    done = program("submit", recipe, "--output-dir", tmp_path / "file/run")
    assert done.returncode == 2
    assert "cannot be written" in done.stderr


def test_a_dry_run_prints_the_script_that_would_run_and_leaves_nothing(cluster: Cluster, recipe: Path, tmp_path: Path):
    done = program("submit", recipe, "--output-dir", tmp_path / "run", "--dry-run")
    assert done.returncode == 0, done.stderr
    tested = subprocess.run(["sbatch", "--test-only"], input=done.stdout, capture_output=True, text=True, check=False)
    assert tested.returncode == 0, tested.stderr
    assert f"runs=({tmp_path}/run)" in done.stdout
    assert list(tmp_path.iterdir()) == []
