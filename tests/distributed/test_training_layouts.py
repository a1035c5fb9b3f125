"""The same responses teach the same policy in every parallel layout: every metric of a step, and the weights after it.

fp32 on gloo. The bounds: sums in another order move a gradient by a few units in its last place; Adam divides it by its
own size, so epsilon is raised to keep noise around zero from becoming a step; one step of two updates. Measured
over five layouts, weights differ by at most 4e-6 after four updates of up to 0.01, and metrics by at most 1.4e-4 of
themselves: the shares of a ratio's variance, differences of nearly equal log-probs; all others by less than 3e-5.
Gradients are held parameter by parameter in `test_model_layouts`.
"""

from pathlib import Path

import pytest
import torch

from tests.distributed.rank_pool import RankPool
from tests.tiny_model import tiny_recipe, write_tiny_model

LAYOUTS = {
    "tensor 2": (2, ["parallel.tensor=2"]),
    "expert 2": (2, ["parallel.expert=2"]),
    "tensor 2, expert 2": (2, ["parallel.tensor=2", "parallel.expert=2", "parallel.expert_tensor=1"]),
    "pipeline 2": (2, ["parallel.pipeline=2"]),
    "pipeline 2, virtual stages": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "data 2": (2, ["parallel.data=2"]),
    "data 2, whole optimizer": (2, ["parallel.data=2", "parallel.distributed_optimizer=false"]),
    "context 2": (2, ["parallel.context=2"]),
    "context 2, expert 2, recompute": (2, ["parallel.context=2", "parallel.expert=2", "model.recompute=selective"]),
    "tensor 2, context 2": (4, ["parallel.tensor=2", "parallel.context=2"]),
    "pipeline 2, context 2, recompute": (
        4,
        ["parallel.pipeline=2", "parallel.context=2", "model.recompute=full"],
    ),
    "tensor 2, pipeline 2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "tensor 2, data 2, expert 2": (
        4,
        ["parallel.tensor=2", "parallel.data=2", "parallel.expert=2", "parallel.expert_tensor=1"],
    ),
    # Ranks with other tokens share an expert: its width, and in the second its ranks' unequal counts of tokens.
    "expert tensor 2": (2, ["parallel.expert_tensor=2"]),
    "tensor 2, expert 2, expert tensor 2": (4, ["parallel.tensor=2", "parallel.expert=2"]),
    "tensor 2, selective recompute": (2, ["parallel.tensor=2", "model.recompute=selective"]),
    "recompute": (1, ["model.recompute=full"]),
    "pipeline 2, recompute": (2, ["parallel.pipeline=2", "model.recompute=full"]),
}
# Measured by ranks of their own count, or not at all of the policy: how responses were packed.
LAYOUT_DEPENDENT = {"packing/fill_fraction", "packing/rank_token_imbalance"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory: Path = tmp_path_factory.mktemp("layouts")
    write_tiny_model(directory / "model", num_hidden_layers=4)
    text = tiny_recipe(
        directory / "model",
        training={"learning_rate": 0.01, "adam_epsilon": 0.0001, "tokens_per_micro_batch": 96},
        routing={"probe_responses": 8},
    )
    (directory / "recipe.yaml").write_text(text)
    return str(directory / "recipe.yaml")


ARMS = {
    "gspo": ["objective.name=gspo", "routing.replay=off"],
    "grpo with r2": ["objective.name=grpo", "routing.replay=r2"],
    "grpo with r3": ["objective.name=grpo", "routing.replay=r3"],
}
REPLAYED = {"gspo": 0.0, "grpo with r2": 1.0, "grpo with r3": 1.0}


def learn(ranks: RankPool, recipe: str, num_ranks: int, layout: list[str]) -> list[dict]:
    # Four ranks take turns on two cores: there the arm that records, replays and compares stands for all.
    arms = ARMS if num_ranks < 4 else {"grpo with r2": ARMS["grpo with r2"]}
    function = "tests.distributed.training_on_ranks:learn_arms_on_ranks"
    return ranks.run(function, num_ranks=num_ranks, recipe=recipe, layout=layout, arms=arms, num_steps=1)


@pytest.fixture(scope="module")
def one_rank(recipe: str, ranks: RankPool) -> dict:
    return learn(ranks, recipe, 1, [])[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_learns_the_same(layout: str, ranks: RankPool, recipe: str, one_rank: dict) -> None:
    num_ranks, options = LAYOUTS[layout]
    for rank in learn(ranks, recipe, num_ranks, options):
        for arm, found in rank.items():
            check_equal_steps(arm, found["steps"], one_rank[arm]["steps"])
            torch.testing.assert_close(found["weights"], one_rank[arm]["weights"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", [["parallel.data=2"], ["parallel.context=2"]], ids=["data 2", "context 2"])
def test_the_cold_start_counts_every_token_once(layout: list[str], ranks: RankPool, recipe: str) -> None:
    function = "tests.distributed.training_on_ranks:supervise_on_ranks"
    (expected,) = ranks.run(function, num_ranks=1, recipe=recipe, layout=[])
    for found in ranks.run(function, num_ranks=2, recipe=recipe, layout=layout):
        assert found == pytest.approx(expected, rel=1e-5)


def check_equal_steps(arm: str, found_steps: list[dict], expected_steps: list[dict]) -> None:
    for found, expected in zip(found_steps, expected_steps, strict=True):
        assert set(found) == set(expected)
        # 8 responses of 5 to 27 tokens a mini-batch: shared out by count alone, ranks were up to a quarter off.
        assert 1.0 <= found["packing/rank_token_imbalance"] < 1.05
        for name in set(expected) - LAYOUT_DEPENDENT:
            assert found[name] == pytest.approx(expected[name], rel=5e-4, abs=1e-6), f"{arm}: {name}"


def test_what_is_replayed_is_measured_in_the_routers(one_rank: dict) -> None:
    for arm, result in one_rank.items():
        for step in result["steps"]:
            assert step["routing/replayed_token_fraction"] == REPLAYED[arm]
            # fp32 on one machine: two measurements of one policy agree, and its updates are seen above that.
            assert step["routing/noise_floor"] == step["routing/noise_floor_repacked"] == 0.0
            assert step["routing/change_rate"] > 0.0


def test_the_arms_differ(one_rank: dict) -> None:
    # Or the comparison over layouts would say nothing about replay.
    gspo, r2, r3 = (one_rank[arm]["weights"] for arm in ARMS)
    for first, second in ((gspo, r2), (gspo, r3), (r2, r3)):
        assert float((first - second).abs().max()) > 1e-3
