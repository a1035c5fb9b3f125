"""The same responses teach the same policy in every parallel layout: every metric of a step, and the weights after it.

Both objectives, every replay mode, with and without recompute: of those twelve arms every layout on several ranks is tried
with six, in which each pair of switches meets, and its neighbour with the others; with all where $EVERY_ARM is set. fp32 on
gloo, one step of two updates. Sums in another order move a gradient by a few units in its last place: measured, by at most
1.3e-6 of the parameter's largest. Adam divides it by its own size, so epsilon is raised to keep noise around zero from
becoming a step: weights differ by at most 3.6e-6 after updates of up to 0.01. Metrics differ by at most 3.4e-5 of themselves
or, where terms cancel, by 8e-7.
"""

import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch

from tests.distributed.rank_pool import RankPool
from tests.tiny_model import tiny_recipe, write_tiny_model

RANKS = "tests.distributed.training_on_ranks:"
ONE_RANK = "one rank"
# Virtual stages want a layer each.
FOUR_LAYERS = "one rank, four layers"
OVERLAP = ["parallel.overlap_gradient_reduce=true", "parallel.overlap_parameter_gather=true"]
VIRTUAL = ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]
# Each mini-batch in two micro-batches; else each is one.
IN_TWO = ["training.tokens_per_micro_batch=64"]

NUM_GROUPS = 8
OBJECTIVES = ("gspo", "grpo")
REPLAY = ("off", "r2", "r3")
RECOMPUTE = ("none", "full")
ARMS = {
    f"{objective}, replay {replay}, recompute {recompute}": [
        f"objective.name={objective}",
        f"routing.replay={replay}",
        f"model.recompute={recompute}",
    ]
    for objective, replay, recompute in product(OBJECTIVES, REPLAY, RECOMPUTE)
}
# Two halves: by whether an odd number of an arm's switches stand at their second place.
HALVES = [
    {
        arm: ARMS[arm]
        for arm, places in zip(ARMS, product(range(2), range(3), range(2)), strict=True)
        if sum(places) % 2 == odd
    }
    for odd in range(2)
]
# Records, replays and compares.
RICHEST = "grpo, replay r2, recompute none"

# By number of ranks.
LAYOUTS = {
    1: {ONE_RANK: [], FOUR_LAYERS: []},
    2: {
        "tensor 2": ["parallel.tensor=2"],
        "tensor 2, expert 2": ["parallel.tensor=2", "parallel.expert=2", "parallel.expert_tensor=1"],
        "data 2": ["parallel.data=2"],
        "data 2, expert 2": ["parallel.expert=2"],
        # Ranks with other tokens share an expert's width.
        "expert tensor 2": ["parallel.expert_tensor=2"],
        "pipeline 2": ["parallel.pipeline=2", *IN_TWO],
        "pipeline 2, virtual stages": [*VIRTUAL, *IN_TWO],
        "context 2": ["parallel.context=2"],
    },
    4: {
        "tensor 2, pipeline 2": ["parallel.tensor=2", "parallel.pipeline=2"],
    },
}
BY_TURNS = [layout for num_ranks in (2, 4) for layout in LAYOUTS[num_ranks]]
# By number of ranks; the same and more in them, each with the richest arm. A layout's options overrule the arm's.
VARIANTS = {
    2: {
        "data 2, whole optimizer": ["parallel.data=2", "parallel.distributed_optimizer=false"],
        "data 2, overlap": ["parallel.data=2", *OVERLAP],
        "data 2, expert 2, overlap": ["parallel.expert=2", "parallel.overlap_gradient_reduce=true"],
        "tensor 2, selective recompute": ["parallel.tensor=2", "model.recompute=selective"],
        "tensor 2, allgather": ["parallel.tensor=2", "parallel.dispatcher=allgather"],
        "context 2, expert 2, recompute": ["parallel.context=2", "parallel.expert=2", "model.recompute=selective"],
        "context 2, expert 2, allgather": ["parallel.context=2", "parallel.expert=2", "parallel.dispatcher=allgather"],
    },
    4: {
        "tensor 2, pipeline 2, allgather": [
            "parallel.tensor=2",
            "parallel.pipeline=2",
            "parallel.dispatcher=allgather",
            *IN_TWO,
        ],
        # Two copies of every expert.
        "data 4, expert 2": ["parallel.data=4", "parallel.expert=2"],
        "tensor 2, context 2": ["parallel.tensor=2", "parallel.context=2"],
        "pipeline 2, context 2, recompute": ["parallel.pipeline=2", "parallel.context=2", "model.recompute=full"],
        "pipeline 2, virtual stages, context 2": [*VIRTUAL, "parallel.context=2"],
        "pipeline 2, virtual stages, data 2, overlap": [*VIRTUAL, "parallel.data=2", *OVERLAP],
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
# By number of ranks; the richest arm where half of the groups' rewards are equal, so that nothing is learned from them.
HALF_EQUAL = {
    1: {"one rank, half equal": []},
    2: {
        "data 2, half equal": ["parallel.data=2"],
        "pipeline 2, half equal": ["parallel.pipeline=2", *IN_TWO],
        "context 2, half equal": ["parallel.context=2"],
    },
    4: {"data 4, expert 2, half equal": ["parallel.data=4", "parallel.expert=2"]},
}
# Measured by ranks of their own count, or not at all of the policy: how responses were packed.
LAYOUT_DEPENDENT = {"packing/fill_fraction", "packing/rank_token_imbalance"}


def arms_of(layout: str) -> dict[str, list[str]]:
    """The arms that a layout is tried with."""
    if layout in LAYOUTS[1]:
        return ARMS
    if layout not in BY_TURNS:
        return {RICHEST: ARMS[RICHEST]}
    return ARMS if os.environ.get("EVERY_ARM") else HALVES[BY_TURNS.index(layout) % 2]


def compared() -> Iterator[tuple[str, str]]:
    """Every layout with each of its arms."""
    for layouts in (*LAYOUTS.values(), *VARIANTS.values()):
        for layout in layouts:
            yield from product([layout], arms_of(layout))


def reference_of(layout: str, arm: str) -> tuple[str, str]:
    """The layout and the arm on one rank, without recompute, that it must come to the same as."""
    return (
        FOUR_LAYERS if "virtual" in layout or layout == FOUR_LAYERS else ONE_RANK,
        arm.replace("recompute full", "recompute none"),
    )


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A recipe for a model of two layers, and one of four, by the layout that stands for it."""
    directory: Path = tmp_path_factory.mktemp("layouts")
    found = {}
    for name, num_layers in ((ONE_RANK, 2), (FOUR_LAYERS, 4)):
        model = write_tiny_model(directory / f"model_{num_layers}", num_hidden_layers=num_layers)
        text = tiny_recipe(
            model,
            rollout={"responses_per_prompt": 2, "max_response_tokens": 9},
            training={
                "prompts_per_step": NUM_GROUPS,
                "learning_rate": 0.01,
                "adam_epsilon": 0.0001,
                "tokens_per_micro_batch": 256,
            },
            routing={"probe_responses": 2},
        )
        path = directory / f"recipe_{num_layers}.yaml"
        path.write_text(text)
        found[name] = str(path)
    return found


@pytest.fixture(scope="module")
def learnt(recipes: dict[str, str], ranks: RankPool) -> dict[tuple[str, str], list[dict]]:
    """What each rank comes to, by layout and arm. The arms of a layout share their ranks.

    Layouts do not: gloo's threads of a former one would stay, and wake up a hundred times a second each.
    """
    found: dict[tuple[str, str], list[dict]] = {}
    for num_ranks, layouts in LAYOUTS.items():
        half_equal = HALF_EQUAL[num_ranks]
        for name, options in (layouts | VARIANTS.get(num_ranks, {}) | half_equal).items():
            of_ranks = ranks.run(
                RANKS + "learn_on_ranks",
                num_ranks=num_ranks,
                recipe=recipes[reference_of(name, RICHEST)[0]],
                options=options,
                arms=arms_of(name),
                num_equal=NUM_GROUPS // 2 if name in half_equal else 0,
            )
            found |= {(name, arm): [of_rank[arm] for of_rank in of_ranks] for arm in of_ranks[0]}
    return found


@pytest.mark.parametrize(("layout", "arm"), compared())
def test_every_layout_learns_the_same(layout: str, arm: str, learnt: dict[tuple[str, str], list[dict]]) -> None:
    (expected,) = learnt[reference_of(layout, arm)]
    for found in learnt[layout, arm]:
        check_equal_metrics(found["metrics"], expected["metrics"])
        check_equal_gradients(found["gradients"], expected["gradients"])
        torch.testing.assert_close(found["weights"], expected["weights"], rtol=0, atol=1e-5)
        # 8 responses of 5 to 17 tokens a mini-batch: shared out by count alone, ranks are up to a quarter off.
        assert 1.0 <= found["metrics"]["packing/rank_token_imbalance"] < 1.1


@pytest.mark.parametrize("layout", [layout for num_ranks in (2, 4) for layout in HALF_EQUAL[num_ranks]])
def test_every_layout_leaves_out_the_same_responses(layout: str, learnt: dict[tuple[str, str], list[dict]]) -> None:
    (expected,) = learnt["one rank, half equal", RICHEST]
    assert expected["metrics"]["groups/zero_variance_fraction"] == 0.5
    for found in learnt[layout, RICHEST]:
        check_equal_metrics(found["metrics"], expected["metrics"])
        check_equal_gradients(found["gradients"], expected["gradients"])
        torch.testing.assert_close(found["weights"], expected["weights"], rtol=0, atol=1e-5)


def check_equal_metrics(found: dict[str, float], expected: dict[str, float]) -> None:
    assert set(found) == set(expected)
    for name in set(expected) - LAYOUT_DEPENDENT:
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


def check_equal_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Each parameter's gradient, to a share of its largest element."""
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        apart, largest = (float(tensor.abs().max()) for tensor in (gradient - expected[name], expected[name]))
        assert apart <= 1e-5 * largest, name


@pytest.mark.parametrize("layout", [["parallel.data=2"], ["parallel.context=2"]], ids=["data 2", "context 2"])
def test_the_cold_start_counts_every_token_once(layout: list[str], ranks: RankPool, recipes: dict[str, str]) -> None:
    function, recipe = RANKS + "supervise_on_ranks", recipes[ONE_RANK]
    (expected,) = ranks.run(function, num_ranks=1, recipe=recipe, layout=[])
    for found in ranks.run(function, num_ranks=2, recipe=recipe, layout=layout):
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("arm", ARMS)
def test_what_is_replayed_is_measured_in_the_routers(arm: str, learnt: dict[tuple[str, str], list[dict]]) -> None:
    for num_layers, layout in ((2, ONE_RANK), (4, FOUR_LAYERS)):
        (found,) = learnt[layout, arm]
        metrics = found["metrics"]
        assert metrics["routing/replayed_token_fraction"] == (0.0 if "replay off" in arm else 1.0)
        # fp32 on one machine: two measurements of one policy agree, and its updates are seen above that.
        assert metrics["routing/noise_floor"] == metrics["routing/noise_floor_repacked"] == 0.0
        for layer in range(1, num_layers + 1):
            assert metrics[f"routing/change_rate_layer_{layer}"] > 0.0


def test_the_arms_differ(learnt: dict[tuple[str, str], list[dict]]) -> None:
    # Or the comparison over layouts would say nothing about the objective and about replay.
    arms = [arm for arm in ARMS if "recompute none" in arm]
    weights = [learnt[ONE_RANK, arm][0]["weights"] for arm in arms]
    for number, one in enumerate(weights):
        for other in weights[:number]:
            assert float((one - other).abs().max()) > 1e-3


def test_gradients_of_all_parameters_are_compared(learnt: dict[tuple[str, str], list[dict]]) -> None:
    for layout, num_weights in ((ONE_RANK, 45), (FOUR_LAYERS, 87)):
        for arm in ARMS:
            gradients = learnt[layout, arm][0]["gradients"]
            assert len(gradients) == num_weights
            assert all(gradient.abs().max() > 0 for gradient in gradients.values())
