"""Every recipe that is shipped loads, and says what the paper says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_gspo.config import Recipe, dump_recipe, load_recipe

RECIPES = Path(__file__).parents[3] / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def shipped(name: str, *overrides: str) -> Recipe:
    return load_recipe(RECIPES / f"{name}.yaml", overrides)


def test_the_recipes_relied_on_are_there() -> None:
    tiny = {"tiny_gspo", "tiny_grpo", "tiny_grpo_r2"}
    cluster = {f"qwen3_30b_a3b_{arm}" for arm in ("gspo", "grpo", "grpo_r2", "grpo_r3")}
    assert tiny | cluster | {"qwen3_235b_a22b_gspo"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_loads_and_survives_being_written_out(name: str, tmp_path: Path) -> None:
    recipe = shipped(name)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize("name", NAMES)
def test_every_arm_updates_four_times_a_step(name: str) -> None:
    assert shipped(name).training.mini_batches == 4


@pytest.mark.parametrize(
    ("arm", "objective", "clip_low", "clip_high", "replay"),
    [
        ("gspo", "gspo", 3e-4, 4e-4, "off"),
        ("grpo", "grpo", 0.2, 0.27, "off"),
        ("grpo_r2", "grpo", 0.2, 0.27, "r2"),
        ("grpo_r3", "grpo", 0.2, 0.27, "r3"),
    ],
)
def test_cluster_arms_have_the_papers_clip_ranges_and_differ_in_nothing_else(
    arm: str, objective: str, clip_low: float, clip_high: float, replay: str
) -> None:
    recipe, gspo = shipped(f"qwen3_30b_a3b_{arm}"), shipped("qwen3_30b_a3b_gspo")
    assert (recipe.objective.name, recipe.routing.replay) == (objective, replay)
    assert (recipe.objective.clip_low, recipe.objective.clip_high) == (clip_low, clip_high)
    same = {"objective": gspo.objective, "routing": gspo.routing}
    assert recipe.model_copy(update=same) == gspo


@pytest.mark.parametrize(("arm", "objective", "replay"), [("grpo", "grpo", "off"), ("grpo_r2", "grpo", "r2")])
def test_tiny_arms_differ_in_objective_and_replay_alone(arm: str, objective: str, replay: str) -> None:
    by_file = shipped(f"tiny_{arm}")
    assert by_file == shipped("tiny_gspo", f"objective.name={objective}", f"routing.replay={replay}")


def test_tiny_recipes_leave_the_clip_range_to_the_objective() -> None:
    objective = shipped("tiny_gspo").objective
    assert (objective.clip_low, objective.clip_high) == (None, None)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("tiny_")])
def test_tiny_recipes_run_in_one_process_and_only_that_of_sglang_beside_a_server(name: str) -> None:
    recipe = shipped(name)
    assert recipe.parallel.world_size == 1
    assert (recipe.rollout.engine == "local") is ("sglang" not in name)


@pytest.mark.parametrize("override", ["parallel.tensor=2", "parallel.expert=2", "parallel.pipeline=2"])
def test_a_tiny_recipe_is_spread_over_two_ranks_by_one_override(override: str) -> None:
    assert shipped("tiny_gspo", override).parallel.world_size == 2


def test_the_cluster_layout_takes_32_ranks_or_64() -> None:
    assert shipped("qwen3_30b_a3b_gspo").parallel.world_size == 32
    assert shipped("qwen3_30b_a3b_gspo", "parallel.data=16").parallel.world_size == 64


def test_the_larger_cluster_recipe_differs_in_model_and_layout_alone() -> None:
    larger, smaller = shipped("qwen3_235b_a22b_gspo"), shipped("qwen3_30b_a3b_gspo")
    assert larger.parallel.world_size == 128
    assert larger.model.path.name == "qwen3_235b_a22b"
    sizes = ("num_servers", "tensor_parallel")
    servers = smaller.rollout.sglang.model_copy(update={name: getattr(larger.rollout.sglang, name) for name in sizes})
    assert larger.rollout == smaller.rollout.model_copy(update={"sglang": servers})
    slurm = smaller.slurm.model_copy(update={"nodes": 20, "rollout_nodes": 4})
    assert larger.slurm == slurm
    layout = {"parallel": smaller.parallel, "rollout": smaller.rollout, "slurm": smaller.slurm}
    same = layout | {"model": larger.model.model_copy(update={"path": smaller.model.path})}
    assert larger.model_copy(update=same) == smaller


@pytest.mark.parametrize(
    ("model", "parameters"), [("qwen3_30b_a3b", 30_532_122_624), ("qwen3_235b_a22b", 235_093_634_560)]
)
def test_the_shapes_shipped_for_a_model_add_up_to_its_parameters(model: str, parameters: int) -> None:
    shape = json.loads((RECIPES / f"models/{model}/config.json").read_text())
    hidden, head = shape["hidden_size"], shape["head_dim"]
    query, key = shape["num_attention_heads"] * head, shape["num_key_value_heads"] * head
    attention = hidden * (2 * query + 2 * key) + 2 * head
    experts = shape["num_experts"] * (3 * hidden * shape["moe_intermediate_size"] + hidden)
    layer = attention + experts + 2 * hidden
    assert shape["num_hidden_layers"] * layer + 2 * shape["vocab_size"] * hidden + hidden == parameters
