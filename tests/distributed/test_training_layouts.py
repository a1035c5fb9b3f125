"""The same responses teach the same policy in every parallel layout: every metric of a step, and the weights after it.

fp32 on gloo. The bounds: sums in another order move a gradient by a few units in its last place; Adam divides it by its
own size, so epsilon is raised to keep noise around zero from becoming a step; one step of two updates. Weights differ by
at most 4e-6 after updates of up to 0.01, and metrics by at most 1.4e-4 of themselves: the shares of a ratio's variance,
differences of nearly equal log-probs; all others by less than 3e-5.
"""

from pathlib import Path

import pytest
import torch

from tests.distributed.rank_pool import RankPool
from tests.tiny_model import tiny_recipe, write_tiny_model

RANKS = "tests.distributed.training_on_ranks:"
ONE_RANK = "one rank"
OVERLAP = [
    "parallel.distributed_optimizer=true",
    "parallel.overlap_gradient_reduce=true",
    "parallel.overlap_parameter_gather=true",
]
# By number of ranks.
LAYOUTS = {
    1: {"recompute": ["model.recompute=full"]},
    2: {
        "tensor 2": ["parallel.tensor=2"],
        "tensor 2, selective recompute": ["parallel.tensor=2", "model.recompute=selective"],
        "tensor 2, expert 2": ["parallel.tensor=2", "parallel.expert=2", "parallel.expert_tensor=1"],
        "tensor 2, allgather": ["parallel.tensor=2", "parallel.dispatcher=allgather"],
        "data 2": ["parallel.data=2"],
        "data 2, overlap": ["parallel.data=2", *OVERLAP],
        "data 2, expert 2": ["parallel.expert=2", "parallel.overlap_gradient_reduce=true"],
        # Ranks with other tokens share an expert's width.
        "expert tensor 2": ["parallel.expert_tensor=2"],
        "pipeline 2": ["parallel.pipeline=2"],
        "pipeline 2, recompute": ["parallel.pipeline=2", "model.recompute=full"],
        "pipeline 2, virtual stages": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
        "context 2": ["parallel.context=2"],
        "context 2, expert 2, recompute": ["parallel.context=2", "parallel.expert=2", "model.recompute=selective"],
        "context 2, expert 2, allgather": ["parallel.context=2", "parallel.expert=2", "parallel.dispatcher=allgather"],
    },
    4: {
        "tensor 2, pipeline 2": ["parallel.tensor=2", "parallel.pipeline=2", "parallel.dispatcher=allgather"],
        "tensor 2, context 2": ["parallel.tensor=2", "parallel.context=2"],
        "pipeline 2, context 2, recompute": ["parallel.pipeline=2", "parallel.context=2", "model.recompute=full"],
        "pipeline 2, virtual stages, context 2": [
            "parallel.pipeline=2",
            "parallel.virtual_pipeline=2",
            "parallel.context=2",
        ],
        "pipeline 2, virtual stages, data 2, overlap": [
            "parallel.pipeline=2",
            "parallel.virtual_pipeline=2",
            "parallel.data=2",
            *OVERLAP,
        ],
        "tensor 2, data 2, expert 2": [
            "parallel.tensor=2",
            "parallel.data=2",
            "parallel.expert=2",
            "parallel.expert_tensor=1",
        ],
        # Here the ranks that share an expert's width have unequal counts of tokens, too.
        "tensor 2, expert 2, expert tensor 2": ["parallel.tensor=2", "parallel.expert=2"],
    },
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


WHOLE = "parallel.distributed_optimizer=false"  # the optimizer then has every gradient on every rank
ARMS = {
    "gspo": ["objective.name=gspo", "routing.replay=off", WHOLE],
    "grpo with r2": ["objective.name=grpo", "routing.replay=r2", WHOLE],
    "grpo with r3": ["objective.name=grpo", "routing.replay=r3"],
}
REPLAYED = {"gspo": 0.0, "grpo with r2": 1.0, "grpo with r3": 1.0}


# Where a layout is one of these with more in it, the arm that records, replays and compares stands for all.
WITH_EVERY_ARM = {
    ONE_RANK,
    "recompute",
    "tensor 2",
    "tensor 2, expert 2",
    "data 2",
    "data 2, expert 2",
    "expert tensor 2",
    "pipeline 2",
    "pipeline 2, virtual stages",
    "context 2",
}


def arms_of(layout: str) -> dict[str, list[str]]:
    """What is learnt in a layout: the options of each arm."""
    return ARMS if layout in WITH_EVERY_ARM else {"grpo with r2": ARMS["grpo with r2"]}


@pytest.fixture(scope="module")
def learnt(recipe: str, ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """What each rank comes to, by layout. Layouts with as many ranks share their processes: these cost the most."""
    directory = str(tmp_path_factory.mktemp("worlds"))
    found: dict[str, list[dict]] = {}
    for num_ranks, layouts in ({1: LAYOUTS[1] | {ONE_RANK: []}} | {n: LAYOUTS[n] for n in (2, 4)}).items():
        of_ranks = ranks.run(
            RANKS + "learn_layouts_on_ranks",
            num_ranks=num_ranks,
            recipe=recipe,
            layouts={name: (options, arms_of(name)) for name, options in layouts.items()},
            directory=directory,
        )
        found |= {name: [of_rank[name] for of_rank in of_ranks] for name in layouts}
    return found


@pytest.fixture(scope="module")
def one_rank(learnt: dict[str, list[dict]]) -> dict[str, dict]:
    return learnt[ONE_RANK][0]


@pytest.mark.parametrize("layout", [name for layouts in LAYOUTS.values() for name in layouts])
def test_every_layout_learns_the_same(layout: str, learnt: dict[str, list[dict]], one_rank: dict[str, dict]) -> None:
    for rank in learnt[layout]:
        for arm, found in rank.items():
            expected = one_rank[arm]
            check_equal_metrics(arm, found["metrics"], expected["metrics"])
            check_equal_gradients(arm, found["gradients"], expected["gradients"])
            torch.testing.assert_close(found["weights"], expected["weights"], rtol=0, atol=1e-5)


def test_gradients_are_compared_for_every_objective(learnt: dict[str, list[dict]]) -> None:
    for layout in WITH_EVERY_ARM:
        for arm in ("gspo", "grpo with r2"):
            assert all(len(rank[arm]["gradients"]) > 50 for rank in learnt[layout])


@pytest.mark.parametrize("layout", [["parallel.data=2"], ["parallel.context=2"]], ids=["data 2", "context 2"])
def test_the_cold_start_counts_every_token_once(layout: list[str], ranks: RankPool, recipe: str) -> None:
    function = "tests.distributed.training_on_ranks:supervise_on_ranks"
    (expected,) = ranks.run(function, num_ranks=1, recipe=recipe, layout=[])
    for found in ranks.run(function, num_ranks=2, recipe=recipe, layout=layout):
        assert found == pytest.approx(expected, rel=1e-5)


def check_equal_metrics(arm: str, found: dict[str, float], expected: dict[str, float]) -> None:
    assert set(found) == set(expected)
    # 8 responses of 5 to 27 tokens a mini-batch: shared out by count alone, ranks were up to a quarter off.
    assert 1.0 <= found["packing/rank_token_imbalance"] < 1.05
    for name in set(expected) - LAYOUT_DEPENDENT:
        assert found[name] == pytest.approx(expected[name], rel=5e-4, abs=1e-6), f"{arm}: {name}"


def check_equal_gradients(arm: str, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Each parameter's gradient, to a share of its largest element; none where the optimizer is distributed."""
    assert not found or found.keys() == expected.keys()
    for name, gradient in found.items():
        tolerance = 1e-4 * float(expected[name].abs().max())
        torch.testing.assert_close(
            gradient, expected[name], rtol=0, atol=tolerance, msg=lambda text, n=name: f"{arm}: {n}: {text}"
        )


def test_what_is_replayed_is_measured_in_the_routers(one_rank: dict[str, dict]) -> None:
    for arm, result in one_rank.items():
        metrics = result["metrics"]
        assert metrics["routing/replayed_token_fraction"] == REPLAYED[arm]
        # fp32 on one machine: two measurements of one policy agree, and its updates are seen above that.
        assert metrics["routing/noise_floor"] == metrics["routing/noise_floor_repacked"] == 0.0
        assert metrics["routing/change_rate"] > 0.0
        assert {f"routing/change_rate_layer_{layer}" for layer in range(1, 5)} <= metrics.keys()


def test_the_arms_differ(one_rank: dict[str, dict]) -> None:
    # Or the comparison over layouts would say nothing about replay.
    gspo, r2, r3 = (one_rank[arm]["weights"] for arm in ARMS)
    for first, second in ((gspo, r2), (gspo, r3), (r2, r3)):
        assert float((first - second).abs().max()) > 1e-3
