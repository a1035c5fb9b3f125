"""What clusters do to jobs, done to jobs: each function takes a run, or several, from submission to its end.

They run beside each other, so each keeps to nodes of its own where it takes some away: node2 and node4 lose runs by the
death of node4, node3 by a partition that goes first.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from tests.slurm.cluster import Cluster, job_details, kill_ranks, run, wait_for
from tests.slurm.held_reward import VARIABLE
from tests.slurm.submitted import NEVER_S, OVER, Submitted, hold_after, hold_of, program, submit

STEPS = 7
UNDISTURBED = "--exclude=node3,node4"
MODULES = Path("/etc/profile.d/modules.sh")  # of Debian's environment-modules
MODULE_SAYS = "this module was loaded"


@dataclass(frozen=True)
class Limited:
    """On two nodes: reached its time limit, then lost a node."""

    run: Submitted
    status: str  # printed while the second attempt ran


def reach_the_time_limit_and_lose_a_node(cluster: Cluster, recipe: Path) -> Limited:
    nodes = "slurm.sbatch_options=--nodelist=node2,node4"
    limited = submit(recipe.parent / "limited", recipe, "parallel.data=2", nodes, "--nodes", 2, hold_at=2)
    limited.wait_until_held(after=2)
    # Five minutes are what slurm.save_before_limit_s asks for: slurmctld signals when it next looks at its clock.
    run("scontrol", "update", f"JobId={limited.job}", "TimeLimit=5")
    limited.wait_until_it_says("asked to save and stop")
    limited.hold_after(5)
    limited.wait_for_requeue()
    run("scontrol", "update", f"JobId={limited.job}", "TimeLimit=30")
    limited.start_again()
    limited.wait_until_held(after=5)
    status = program("status", limited.job).stdout
    cluster.kill_node("node4")
    limited.wait_until_it_says("asked to end")
    kill_ranks(limited.job)
    limited.wait_for_requeue()
    cluster.start_node("node4")
    limited.release()
    limited.start_again()
    limited.wait_for_end("COMPLETED")
    return Limited(limited, status)


def go_undisturbed(cluster: Cluster, recipe: Path) -> Submitted:
    """The same run with both ranks on one node, and fake GPUs, and a module where there are modules."""
    modules = recipe.parent / "modules"
    modules.mkdir()
    (modules / "spoken").write_text(f'#%Module\nputs stderr "{MODULE_SAYS}"\n')
    undisturbed = submit(
        recipe.parent / "undisturbed",
        recipe,
        f"slurm.sbatch_options={UNDISTURBED}",
        *(["slurm.modules=spoken"] if MODULES.exists() else []),
        *("--gpus-per-node", 2),
        MODULEPATH=str(modules),
    )
    undisturbed.wait_for_end("COMPLETED")
    return undisturbed


@dataclass(frozen=True)
class Moved:
    """Preempted, requeued by an operator, stopped when it might start no more, and gone on with by hand."""

    job: Submitted
    restarts: str  # of the job, as SLURM counts them
    saved: int  # by the job
    said: str  # by its last attempt


def be_preempted_requeued_and_stopped(cluster: Cluster, recipe: Path) -> Moved:
    moved = submit(
        recipe.parent / "moved",
        recipe,
        *("slurm.max_requeues=2", "slurm.sbatch_options=--nodelist=node3"),
        hold_at=2,
    )
    moved.wait_until_held(after=2)
    run("sbatch", "--partition=urgent", "--nodelist=node3", "--exclusive", "--output=/dev/null", "--wrap=true")
    moved.wait_until_it_says("asked to end")
    moved.hold_after(4)
    moved.start_again()
    moved.wait_until_held(after=4)
    run("scontrol", "requeue", moved.job)
    wait_for(lambda: "asked to end" in moved.log(1), "the script to hear of it", NEVER_S)
    moved.hold_after(5)
    moved.start_again()
    moved.wait_while_it_lives(lambda: "going on from" in moved.log(2), "start after step 5")
    run("scancel", "--batch", "--signal=USR1", moved.job)
    moved.wait_until_it_says("asked to save and stop")
    moved.release()
    moved.wait_for_end("FAILED")
    ended = Moved(moved, job_details(moved.job)["Restarts"], moved.newest_checkpoint(), moved.log(2))
    moved.go_on_by_hand().wait_for_end("COMPLETED")
    return ended


def fail_twice(cluster: Cluster, recipe: Path) -> Submitted:
    """Fails at its first update, whenever it is tried; and scontrol is ended by the signal that its own request brings."""
    directory = recipe.parent / "ended_scontrol"
    directory.mkdir()
    wrapper = directory / "scontrol"
    wrapper.write_text('#!/bin/bash\n"$REAL_SCONTROL" "$@" || exit\nif [ "$1" = requeue ]; then kill -TERM $$; fi\n')
    wrapper.chmod(0o755)
    failing = submit(
        recipe.parent / "failing",
        recipe,
        *("objective.name=tests.slurm.failing_objective:OBJECTIVE", f"slurm.sbatch_options={UNDISTURBED}"),
        PATH=f"{directory}:{os.environ['PATH']}",
        REAL_SCONTROL=run("which", "scontrol").strip(),
    )
    failing.wait_until_it_says("tried once more")  # before that it is pending too
    failing.start_again()
    failing.wait_for_end("FAILED")
    return failing


@dataclass(frozen=True)
class Array:
    """Two arms and two seeds where jobs may not requeue, and one of the four goes on as another job."""

    output: Path
    tasks: list[Submitted]  # the second with the job that it went on as
    comparison: str
    dependency: str  # of the comparison, when it was submitted
    status: str


def compare_arms_and_seeds(cluster: Cluster, recipe: Path) -> Array:
    (recipe.parent / "grpo.yaml").write_text("base: tiny.yaml\nobjective:\n  name: grpo\n")
    output = recipe.parent / "array"
    names = [f"{arm}_seed_{seed}" for arm in ("tiny", "grpo") for seed in (1, 2)]
    hold_after(Path(f"{hold_of(output)}1"), output / names[1], 1)
    done = program(
        *("submit", recipe, "slurm.requeue=off", f"slurm.sbatch_options={UNDISTURBED}"),
        *("--arms", recipe.parent / "grpo.yaml", "--seeds", "1,2", "--output-dir", output),
        **{VARIABLE: str(hold_of(output))},
    )
    assert done.returncode == 0, done.stderr
    array, comparison = re.findall(r"Submitted job (\d+)", done.stdout)
    dependency = job_details(comparison)["Dependency"]
    tasks = [
        Submitted(output / name, f"{array}_{number}", Path(f"{hold_of(output)}{number}"))
        for number, name in enumerate(names)
    ]
    stopped = tasks[1]
    stopped.wait_until_held(after=1)
    run("scancel", "--batch", "--signal=USR1", stopped.job)
    stopped.wait_until_it_says("asked to save and stop")
    stopped.hold_after(3)
    for task in tasks:
        task.wait_for_end("COMPLETED")
    note = stopped.directory / "slurm/job_id"
    tasks[1] = Submitted(stopped.directory, note.read_text().strip(), stopped.hold)
    tasks[1].wait_until_held(after=3)
    # The array has ended, and its comparison finds a run that has not.
    wait_for(lambda: job_details(comparison)["JobState"] in OVER, "the comparison to look", NEVER_S, every_s=0.5)
    status = program("status", output).stdout
    assert not (output / "compare.html").exists()
    tasks[1].release()
    tasks[1].wait_for_end("COMPLETED")
    said = (output / f"slurm/compare_{comparison}.log").read_text()
    comparison = said.split()[-1]
    wait_for(lambda: job_details(comparison)["JobState"] in OVER, "the comparison", NEVER_S, every_s=0.5)
    return Array(output, tasks, comparison, dependency, status)


@dataclass(frozen=True)
class Served:
    """Sampled from an SGLang server on a node of its own, and told to save in the middle of a step."""

    run: Submitted
    files: dict[str, int]  # what lay in its servers' directory while it ran, with the mode
    directory_mode: int
    key: str


def sample_from_another_node(cluster: Cluster, recipe: Path) -> Served:
    served = submit(
        recipe.parent / "served",
        recipe.parent / "sglang.yaml",
        *("slurm.max_requeues=0", f"slurm.sbatch_options={UNDISTURBED}"),
        *("--nodes", 2, "--rollout-nodes", 1),
        hold_at=1,
    )
    served.wait_until_held(after=1)
    private = served.directory.parent / ".served.servers"
    files = {path.name: path.stat().st_mode & 0o777 for path in private.iterdir()}
    mode, key = private.stat().st_mode & 0o777, (private / "key").read_text()
    run("scancel", "--batch", "--signal=USR1", served.job)
    served.wait_until_it_says("asked to save and stop")
    served.release()
    served.wait_for_end("FAILED")
    wait_for(lambda: not private.exists(), "the servers' directory to go", NEVER_S)
    return Served(served, files, mode, key)


@dataclass(frozen=True)
class Beside:
    """Its server shares a node with its rank: it cannot start, is mended by hand, and the job is cancelled in a step."""

    refused: str  # said by the first attempt
    left: bool  # whether the first attempt's directory of servers was still there
    job: Submitted  # the second


def sample_beside_a_server_and_be_cancelled(cluster: Cluster, recipe: Path) -> Beside:
    unserved = submit(
        recipe.parent / "beside",
        recipe.parent / "sglang.yaml",
        f"slurm.sbatch_options={UNDISTURBED}",
        hold_at=1,
        MEGATRON_GSPO_SGLANG_PYTHON="/nowhere/python",
    )
    unserved.wait_for_end("FAILED")
    refused, private = unserved.log(), unserved.directory.parent / ".beside.servers"
    left = private.exists()
    beside = unserved.go_on_by_hand()
    beside.wait_until_held(after=1)
    run("scancel", beside.job)
    beside.wait_until_it_says("asked to end")
    beside.release()
    beside.wait_for_end("CANCELLED")
    wait_for(lambda: not private.exists(), "the servers' directory to go", NEVER_S)
    return Beside(refused, left, beside)


def start_where_a_node_does_not_see_the_directory(cluster: Cluster, recipe: Path) -> Submitted:
    unseen = submit(
        cluster.unshared / "run", recipe, "parallel.data=2", "slurm.sbatch_options=--nodelist=node[1-2]", "--nodes", 2
    )
    unseen.wait_for_end("FAILED")
    return unseen
