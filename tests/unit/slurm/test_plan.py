"""Which runs a submission asks for, and what is refused before any scheduler is asked."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_gspo.cli import parse
from megatron_gspo.slurm.arguments import Submission, read_submit
from megatron_gspo.slurm.plan import make_plan
from megatron_gspo.types import UserError

RECIPES = Path(__file__).parents[3] / "recipes"
SGLANG = ("rollout.engine=sglang",)
RUNNING = (
    "rollout.sglang.urls=http://10.0.0.5:30000",
    "rollout.sglang.key_file=key",
    "rollout.sglang.weights_dir=weights",
)


def test_without_gpus_the_layouts_ranks_are_spread_over_the_nodes(submission: Callable[..., Submission]):
    plan = make_plan(submission("parallel.data=4", "--nodes", 2))
    assert plan.ranks_per_node == 2
    assert plan.recipe.parallel.world_size == 4
    assert plan.remarks == ()


def test_with_gpus_every_one_has_a_rank_and_the_replicas_follow(submission: Callable[..., Submission]):
    plan = make_plan(submission("parallel.tensor=2", "--nodes", 2, "--gpus-per-node", 4))
    assert plan.ranks_per_node == 4
    assert (plan.recipe.parallel.tensor, plan.recipe.parallel.data) == (2, 4)
    assert plan.remarks == ("8 GPUs hold 4 replicas: parallel.data is set to that",)


def test_tensor_parallelism_over_nodes_is_remarked_on(submission: Callable[..., Submission]):
    plan = make_plan(submission("parallel.tensor=2", "--nodes", 2, "--gpus-per-node", 1))
    assert "parallel.tensor 2 reaches over nodes" in plan.remarks[0]


def test_arms_times_seeds_have_a_directory_each(recipe: Path, submission: Callable[..., Submission], tmp_path: Path):
    other = recipe.parent / "other.yaml"
    other.write_text("base: tiny.yaml\nobjective:\n  name: grpo\n")
    plan = make_plan(submission("--arms", f"{recipe},{other}", "--seeds", "3,4"))
    assert [run.directory.name for run in plan.runs] == ["tiny_seed_3", "tiny_seed_4", "other_seed_3", "other_seed_4"]
    assert [run.recipe.seed for run in plan.runs] == [3, 4, 3, 4]
    assert [run.recipe.objective.name for run in plan.runs] == ["gspo", "gspo", "grpo", "grpo"]
    assert not any(tmp_path.iterdir())


def test_servers_take_the_last_nodes_and_ranks_the_others(submission: Callable[..., Submission]):
    plan = make_plan(submission(*SGLANG, "--nodes", 3, "--rollout-nodes", 1, "--gpus-per-node", 4))
    assert (plan.ranks_per_node, plan.recipe.parallel.data) == (4, 8)
    assert plan.remarks == (
        "rollout.sglang.num_servers × tensor_parallel leaves 3 GPUs of each rollout node idle",
        "8 GPUs hold 8 replicas: parallel.data is set to that",
    )
    full = (*SGLANG, "rollout.sglang.num_servers=4", "parallel.data=8")
    assert make_plan(submission(*full, "--nodes", 3, "--rollout-nodes", 1, "--gpus-per-node", 4)).remarks == ()


def test_servers_beside_the_ranks_take_no_nodes_from_them(submission: Callable[..., Submission]):
    plan = make_plan(submission(*SGLANG, "parallel.data=4", "--nodes", 2))
    assert (plan.ranks_per_node, plan.remarks) == (2, ())


def test_what_will_not_fit_is_warned_of_where_the_gpus_memory_is_known(submission: Callable[..., Submission]):
    def warnings(*arguments: object) -> list[str]:
        remarks = make_plan(submission(*arguments, "--gpus-per-node", 1)).remarks
        return [remark for remark in remarks if "WARNING" in remark]

    assert warnings() == warnings("--gpu-memory-gib", 80) == []
    (warning,) = warnings("--gpu-memory-gib", 2)
    assert re.search(r"will not fit: the fullest rank takes 4\.\d GiB by estimate, and a GPU has 2\.", warning)
    assert "tools/plan.py RECIPE --gpus 1 --gpus-per-node 1 --gpu-memory 2" in warning
    # The same rank beside a server that keeps its share of the memory, and with the GPU to itself.
    assert "leaves 1.0 to the rank" in warnings(*SGLANG, "rollout.sglang.memory_fraction=0.8", "--gpu-memory-gib", 5)[0]
    assert warnings(*SGLANG, "--nodes", 2, "--rollout-nodes", 1, "--gpu-memory-gib", 5) == []


@pytest.mark.parametrize("name", sorted(path.name for path in RECIPES.glob("qwen3_*.yaml")))
def test_the_cluster_recipes_can_be_submitted_as_they_are_but_for_their_data(name: str, tmp_path: Path):
    words = ["submit", str(RECIPES / name), "data.train=arithmetic_chain", "data.eval=null", "--output-dir"]
    plan = make_plan(read_submit(parse([*words, str(tmp_path / "run")])))
    assert plan.ranks_per_node == 8
    assert plan.remarks == ()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("parallel.data=4", "--nodes", 3), "slurm.nodes is 3; accepted: a divisor of the layout's 4 ranks"),
        (("parallel.tensor=2", "--gpus-per-node", 3), "1 × 3 = 3 ranks; accepted: a multiple of parallel.tensor"),
        (("--nodes", 2, "--rollout-nodes", 1), "slurm.rollout_nodes is 1, but rollout.engine is local; accepted: 0"),
        (
            (*SGLANG, "--nodes", 2, "--rollout-nodes", 2),
            "slurm.rollout_nodes is 2; accepted: less than slurm.nodes (2)",
        ),
        (
            (*SGLANG, *RUNNING, "--nodes", 2, "--rollout-nodes", 1),
            "slurm.rollout_nodes is 1, but rollout.sglang.urls is given; accepted: 0",
        ),
        (
            (*SGLANG, "rollout.sglang.tensor_parallel=4", "rollout.sglang.first_gpu=1", "--gpus-per-node", 4),
            "is 1 × 4 from 1; accepted: what a node of 4 GPUs holds",
        ),
        (("data.train=missing.jsonl",), "which is not a file"),
        (("slurm.partition=two words",), "slurm.partition is the text 'two words'; accepted: one word"),
        (("slurm.time=4", "slurm.save_before_limit_s=240"), "accepted: less than the time limit, 240 s"),
        (
            ("slurm.sbatch_options=rm -rf",),
            "slurm.sbatch_options is the text 'rm -rf'; accepted: options as --name=value",
        ),
    ],
)
def test_what_cannot_run_is_refused(submission: Callable[..., Submission], arguments: tuple, sentence: str):
    with pytest.raises(UserError) as refused:
        make_plan(submission(*arguments))
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_directory_with_a_run_is_refused(submission: Callable[..., Submission], tmp_path: Path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/metrics.jsonl").touch()
    with pytest.raises(UserError, match="holds a run already"):
        make_plan(submission())


def test_arms_must_take_the_same_nodes(recipe: Path, submission: Callable[..., Submission]):
    (recipe.parent / "larger.yaml").write_text("base: tiny.yaml\nparallel:\n  data: 2\n")
    with pytest.raises(UserError, match=r"the layouts take \[1, 2\] ranks a node"):
        make_plan(submission("--arms", recipe.parent / "larger.yaml"))


@pytest.mark.parametrize("seeds", ["1,x", "1,1", "1,,2", "-1"])
def test_seeds_are_different_numbers(submission: Callable[..., Submission], seeds: str):
    with pytest.raises(UserError, match="accepted: different whole numbers"):
        submission(f"--seeds={seeds}")
