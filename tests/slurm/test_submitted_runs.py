"""Runs submitted to a real SLURM: they train, survive what clusters do to jobs, and are refused before they could fail."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.slurm.cluster import Cluster, job_details, run, wait_for
from tests.slurm.lives import (
    MODULE_SAYS,
    MODULES,
    STEPS,
    Array,
    Beside,
    Limited,
    Moved,
    Served,
    be_preempted_requeued_and_stopped,
    compare_arms_and_seeds,
    fail_twice,
    go_undisturbed,
    reach_the_time_limit_and_lose_a_node,
    sample_beside_a_server_and_be_cancelled,
    sample_from_another_node,
    start_where_a_node_does_not_see_the_directory,
)
from tests.slurm.submitted import REPOSITORY, Submitted, program
from tests.tiny_model import tiny_recipe, write_tiny_model

AT_A_TIME = 4  # more lives would start so many ranks at once that none gets on


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("recipe")
    write_tiny_model(directory / "model", architectures=["Qwen3MoeForCausalLM"])
    text = tiny_recipe(
        directory / "model",
        training={"steps": STEPS, "save_every": 2},
        evaluation={"prompts": 2},
        routing={"probe_every": 4},  # a tenth of a run otherwise
        reward={"name": "tests.slurm.held_reward:even_length", "timeout_s": 900},
    )
    (directory / "tiny.yaml").write_text(text)
    servers = {"memory_fraction": 0.3, "max_total_tokens": 8192, "max_requests_in_flight": 32}
    rollout = {"engine": "sglang", "verify_weights": True, "sglang": servers}
    (directory / "sglang.yaml").write_text(yaml.safe_dump({"base": "tiny.yaml", "rollout": rollout}))
    return directory / "tiny.yaml"


@pytest.fixture(scope="module")
def lives(request: pytest.FixtureRequest, cluster: Cluster, recipe: Path) -> Iterator[dict[str, Future[Any]]]:
    """What the tests that were chosen ask for by fixtures of these names, several at a time, the longest first."""
    asked_for = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    pool = ThreadPoolExecutor(AT_A_TIME)
    yield {name: pool.submit(life, cluster, recipe) for name, life in LIVES.items() if name in asked_for}
    pool.shutdown(wait=False, cancel_futures=True)


LIVES: dict[str, Callable[..., Any]] = {
    "limited": reach_the_time_limit_and_lose_a_node,
    "moved": be_preempted_requeued_and_stopped,
    "array": compare_arms_and_seeds,
    "beside": sample_beside_a_server_and_be_cancelled,
    "served": sample_from_another_node,
    "failing": fail_twice,
    "undisturbed": go_undisturbed,
    "unseen": start_where_a_node_does_not_see_the_directory,
}


@pytest.fixture(scope="module")
def limited(lives: dict[str, Future[Any]]) -> Limited:
    return lives["limited"].result()


@pytest.fixture(scope="module")
def array(lives: dict[str, Future[Any]]) -> Array:
    return lives["array"].result()


@pytest.fixture(scope="module")
def served(lives: dict[str, Future[Any]]) -> Served:
    return lives["served"].result()


@pytest.fixture(scope="module")
def moved(lives: dict[str, Future[Any]]) -> Moved:
    return lives["moved"].result()


@pytest.fixture(scope="module")
def failing(lives: dict[str, Future[Any]]) -> Submitted:
    return lives["failing"].result()


@pytest.fixture(scope="module")
def undisturbed(lives: dict[str, Future[Any]]) -> Submitted:
    return lives["undisturbed"].result()


@pytest.fixture(scope="module")
def beside(lives: dict[str, Future[Any]]) -> Beside:
    return lives["beside"].result()


@pytest.fixture(scope="module")
def unseen(lives: dict[str, Future[Any]]) -> Submitted:
    return lives["unseen"].result()


REFUSALS = {
    "a partition that is not there": (("--partition", "nosuch"), "invalid partition specified: nosuch"),
    "more GPUs than nodes have": (("--gpus-per-node", 16), "Requested node configuration is not available"),
    "more nodes than there are": (("--nodes", 5, "--gpus-per-node", 1), "(see slurm.nodes"),
    "a time limit above the partition's": (("--time", "99-00:00:00"), "Requested time limit is invalid"),
    "an account that a partition wants": (("--partition", "billed"), "(see slurm.account)"),
    "a layout that does not fit": (("--nodes", 3), "accepted: a divisor of the layout's 2 ranks"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_is_refused_before_submission_in_one_line(cluster: Cluster, recipe: Path, tmp_path: Path, what: str):
    options, words = REFUSALS[what]
    sizes = ("parallel.data=2", "training.prompts_per_step=160")
    done = program("submit", recipe, *sizes, *options, "--output-dir", tmp_path / "refused")
    assert done.returncode == 2
    assert words in done.stderr
    refusals = [line for line in done.stderr.splitlines() if "is set to that" not in line]
    assert len(refusals) == 1
    assert run("squeue", "-h", "--states=all", "--name=refused") == ""
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


def test_what_a_killed_test_session_has_started_is_gone_with_it(cluster: Cluster, tmp_path: Path):
    (tmp_path / "log").mkdir()
    session = (
        "import os; from pathlib import Path; from tests.slurm.cluster import Cluster, wait_for\n"
        f"daemon = Cluster(Path({str(tmp_path)!r}))._spawn('daemon', 'sleep', '1000').pid\n"
        # Before that it is still setpriv, which has not yet asked to be killed.
        "wait_for(lambda: Path(f'/proc/{daemon}/comm').read_text() == 'sleep\\n', 'the daemon')\n"
        "print(daemon, flush=True)\n"
        f"os.kill(os.getpid(), {signal.SIGKILL:d})"
    )
    printed = subprocess.run(
        [sys.executable, "-c", session], capture_output=True, text=True, cwd=REPOSITORY, check=False
    ).stdout

    def is_gone() -> bool:
        try:
            return Path(f"/proc/{int(printed)}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    wait_for(is_gone, "the daemon to end")


def test_two_nodes_stopped_requeued_and_bereft_of_a_node_compute_what_one_node_computes_undisturbed(
    limited: Limited, undisturbed: Submitted
):
    assert [line["step"] for line in limited.run.lines()] == list(range(STEPS + 1))
    assert limited.run.lines() == undisturbed.lines()
    assert any(line["grad_norm"] > 0 for line in limited.run.lines()[1:])
    exported = [one.directory / f"checkpoints/hf_step_{STEPS}/model.safetensors" for one in (limited.run, undisturbed)]
    assert exported[0].read_bytes() == exported[1].read_bytes()


def test_the_ranks_of_a_job_are_spread_over_its_nodes(limited: Limited, undisturbed: Submitted):
    assert "2 nodes (of node[2,4]), 1 ranks each, after step 0" in limited.run.log(0)
    assert "1 nodes (of node" in undisturbed.log(0)
    assert "2 ranks each" in undisturbed.log(0)


def test_a_job_near_its_limit_saves_and_requeues_itself_and_one_that_loses_a_node_starts_again(limited: Limited):
    # The script heard of the lost node only where SLURM's signal came before its end.
    assert [event for event in limited.run.events() if event != "ended"] == [
        *("started", "stopped", "started", "started", "done")
    ]
    notes = (limited.run.directory / "slurm/attempts.txt").read_text().splitlines()
    assert all(re.fullmatch(r"\S+ \d+ \d (\w+) \d+ (-?\d+|-)", note) for note in notes)
    assert job_details(limited.run.job)["Restarts"] == "2"
    assert "saved after step 3" in limited.run.log(0)
    assert "1 ranks each, after step 3" in limited.run.log(1)
    assert "1 ranks each, after step 4" in limited.run.log(2)


def test_status_tells_state_step_reward_restarts_time_left_and_log(limited: Limited):
    first, second = limited.status.splitlines()
    directory, job = limited.run.directory, limited.run.job
    assert re.fullmatch(
        rf"{directory}  job {job}  RUNNING  step 5/{STEPS}  reward 0\.\d+  restarts 1  \d+:\d+ left", first
    )
    assert second == f"    log: {directory}/slurm/job_{job}_restart_1.log"
    over = program("status", directory).stdout
    assert f"COMPLETED (done)  step {STEPS}/{STEPS}" in over
    assert "restarts 2" in over


def test_a_run_is_not_submitted_twice(limited: Limited, recipe: Path):
    done = program("submit", recipe, "--output-dir", limited.run.directory)
    assert done.returncode == 2
    assert f"to go on with it: sbatch {limited.run.directory}/slurm/train.sbatch" in done.stderr


def test_a_job_preempted_and_one_requeued_by_an_operator_save_and_compute_what_they_would_have(
    moved: Moved, array: Array
):
    assert moved.job.events()[:5] == ["started", "ended", "started", "ended", "started"]
    assert moved.restarts == "2"
    assert "after step 3" in moved.job.log(1)
    assert "after step 5" in moved.job.log(2)
    assert moved.job.lines() == array.tasks[0].lines()


def test_a_job_out_of_requeues_stays_saved_and_goes_on_by_hand(moved: Moved):
    assert moved.saved == 6
    script = moved.job.directory / "slurm/train.sbatch"
    assert f"slurm.max_requeues is 2: stays as it is. To go on: sbatch {script}" in moved.said
    assert moved.job.events()[5:] == ["stopped", "gave_up", "started", "done"]


def test_a_job_that_fails_twice_at_the_same_step_stops_and_says_so(failing: Submitted):
    assert failing.events() == ["started", "failed", "started", "failed", "gave_up"]
    assert "this objective always fails" in failing.log(0)
    assert "failed twice after the checkpoint of step 0 (status 1): not tried again" in failing.log(1)
    assert "FAILED (gave up)" in program("status", failing.directory).stdout
    # Its first requeue was heard by SLURM, and cut short before scontrol could say so.
    assert run("squeue", "-h", "--states=all", "--name=failing", "--format=%i").split() == [failing.job]


def test_arms_and_seeds_are_an_array_of_different_runs(array: Array):
    for task, (arm, seed) in zip(array.tasks, [("gspo", 1), ("gspo", 2), ("grpo", 1), ("grpo", 2)], strict=True):
        assert [line["step"] for line in task.lines()] == list(range(STEPS + 1))
        recipe_of_run = yaml.safe_load((task.directory / "recipe.yaml").read_text())
        assert (recipe_of_run["objective"]["name"], recipe_of_run["seed"]) == (arm, seed)
    assert len({json.dumps(task.lines()) for task in array.tasks}) == 4
    assert len(array.status.splitlines()) == 4 * 2 + 2


def test_where_jobs_may_not_requeue_a_run_goes_on_as_another_and_the_comparison_waits_for_that(array: Array):
    first, second = array.tasks[0], array.tasks[1]
    assert second.job.split("_")[0] != first.job.split("_")[0]
    assert second.events() == ["started", "stopped", "started", "done"]
    assert f"goes on as job {second.job}" in second.log(0)
    assert array.dependency.startswith(f"afterany:{first.job.split('_')[0]}_")
    assert job_details(array.comparison)["Dependency"] == "(null)"
    said = (array.output / f"slurm/compare_{array.comparison}.log").read_text()
    directories = " ".join(str(task.directory) for task in array.tasks)
    assert f"megatron-gspo compare {directories} --output {array.output}/compare.html" in said
    assert job_details(array.comparison)["JobState"] == "COMPLETED", said
    assert "<html" in (array.output / "compare.html").read_text()


def test_status_of_a_comparison_tells_of_the_job_that_draws_it(array: Array):
    waiting = f"{array.output}  comparison: job {array.comparison}  PENDING (Dependency)  page: not drawn yet"
    assert array.status.splitlines()[8:] == [waiting, "    log: not started yet"]
    done = f"{array.output}  comparison: job {array.comparison}  COMPLETED  page: {array.output}/compare.html"
    log = f"    log: {array.output}/slurm/compare_{array.comparison}.log"
    assert program("status", array.comparison).stdout.splitlines() == [done, log]


def test_ranks_sample_from_a_server_on_a_node_of_its_own(served: Served):
    # Told to save in step 2, it finished that step, for which it needs the server.
    assert [line["step"] for line in served.run.lines()] == [0, 1, 2]
    assert all(line["mismatch/log_prob_abs_mean"] < 1e-4 for line in served.run.lines()[1:])
    assert served.run.newest_checkpoint() == 2
    assert served.run.events() == ["started", "stopped", "gave_up"]
    assert "1 nodes (of node[1-2]), 1 ranks each" in served.run.log()


def test_a_jobs_servers_have_a_key_that_nobody_else_can_read_and_that_is_written_nowhere(served: Served):
    assert served.directory_mode == 0o700
    assert served.files["key"] == 0o600
    assert "servers_0_of_1.json" in served.files
    assert len(served.key) == 64
    for file in (path for path in served.run.directory.rglob("*") if path.is_file()):
        assert served.key.encode() not in file.read_bytes(), file
    assert list((served.run.directory / "slurm/servers/machine_0").glob("server_0.log"))


def test_ranks_whose_servers_cannot_start_do_not_wait_for_them(beside: Beside):
    assert "$MEGATRON_GSPO_SGLANG_PYTHON is /nowhere/python, which cannot be run" in beside.refused
    assert beside.job.events()[:2] == ["started", "refused"], beside.refused
    assert not beside.left


def test_a_cancelled_job_saves_the_step_that_it_samples_from_a_server_beside_its_rank(beside: Beside):
    # SLURM's SIGTERM reached every process of the job, the server's too; the step then handed it new weights.
    assert [line["step"] for line in beside.job.lines()] == [0, 1, 2]
    assert all(line["mismatch/log_prob_abs_mean"] < 1e-4 for line in beside.job.lines()[1:])
    assert all(line["rollout/num_restarts"] == line["rollout/num_retries"] == 0 for line in beside.job.lines()[1:])
    assert "is started again" not in beside.job.log()
    assert beside.job.newest_checkpoint() == 2
    assert beside.job.events()[2:] == ["started", "ended"]
    assert re.search(r"1 nodes \(of node\d\), 1 ranks each, after step 0", beside.job.log())
    assert job_details(beside.job.job)["JobState"] == "CANCELLED"


def test_nothing_is_started_where_a_node_does_not_see_the_output_directory(unseen: Submitted):
    assert f"node2 does not see {unseen.directory}/slurm/recipe.yaml" in unseen.log()
    assert unseen.events() == ["started", "refused"]


@pytest.mark.skipif(not MODULES.exists(), reason="Debian's environment-modules is not installed")
def test_environment_modules_are_loaded(undisturbed: Submitted):
    assert MODULE_SAYS in undisturbed.log()
