"""The rules: which answer follows from which runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tools.reproduce.answers import Verdict
from tools.reproduce.claims import CLAIMS
from tools.reproduce.measure import Results
from tools.reproduce.plan import RunSpec
from tools.reproduce.study import FULL, MODELS, QUICK

Study = Callable[..., Results]
CLAIM = {claim.id: claim for claim in CLAIMS}
#: What chance does to a replicate's reward, the same in every arm.
LUCK = {replicate: 0.02 * index for index, replicate in enumerate(FULL[0].replicates)}


def reward_of(**by_arm: float) -> Callable[[RunSpec], dict]:
    """Runs whose reward is constant: 0.6, and more by arm; replicates differ by luck that arms share, and by a little more."""

    def make(spec: RunSpec) -> dict:
        own = 0.002 * len(spec.arm) * (-1) ** spec.seed
        return {"reward/mean": 0.6 + LUCK.get(spec.replicate, 0.0) + own + by_arm.get(spec.arm, 0.0)}

    return make


@pytest.mark.parametrize(
    ("ahead", "verdict"),
    [
        (0.1, Verdict.REPRODUCED),
        (0.01, Verdict.NOT_REPRODUCED),
        (0.0, Verdict.NOT_REPRODUCED),
        (-0.1, Verdict.NOT_REPRODUCED),
    ],
)
def test_an_arm_is_ahead_where_its_interval_leaves_out_0_and_reaches_the_margin(
    study: Study, ahead: float, verdict: Verdict
) -> None:
    assert CLAIM["1b"].answer(study(reward_of(gspo=ahead))).verdict == verdict


def test_an_interval_that_holds_both_0_and_an_advantage_says_nothing(study: Study) -> None:
    def make(spec: RunSpec) -> dict:
        swing = 0.2 * (-1) ** spec.seed if spec.arm == "gspo" else 0.0
        return {"reward/mean": 0.6 + swing}

    answer = CLAIM["1b"].answer(study(make))
    assert answer.verdict == Verdict.NOT_TESTABLE
    assert "replicates (" in answer.sentence  # how many would tell
    half = study(lambda spec: make(spec) if spec.replicate in FULL[0].replicates[:5] else None)
    answer = CLAIM["1b"].answer(half)
    assert answer.verdict == Verdict.OPEN
    assert answer.sentence.startswith("undecided so far")


@pytest.mark.parametrize(
    ("behind", "verdict"),
    [(0.0, Verdict.REPRODUCED), (-0.01, Verdict.REPRODUCED), (-0.1, Verdict.NOT_REPRODUCED)],
)
def test_an_arm_suffices_where_its_interval_leaves_out_the_margin(
    study: Study, behind: float, verdict: Verdict
) -> None:
    def make(spec: RunSpec) -> dict:
        lost = behind if spec.arm == "gspo_engine_wide" else 0.0
        return (
            {"reward/mean": 0.6 + LUCK[spec.replicate] + lost * (1 + 0.1 * (-1) ** spec.seed)}
            if spec.replicate in LUCK
            else {}
        )

    assert CLAIM["6c"].answer(study(make)).verdict == verdict


def test_few_replicates_or_one_cold_start_answer_nothing(study: Study) -> None:
    make = reward_of(gspo=0.3)
    one_start = study(lambda spec: make(spec) if spec.cold_start == 1 else None)
    assert len(one_start.of("common", "gspo")) == 5
    few = study(lambda spec: make(spec) if spec.replicate in FULL[0].replicates[:4] else None)
    for results, told in ((one_start, "1 of 2 cold starts"), (few, "4 of 5 replicates")):
        answer = CLAIM["1b"].answer(results)
        assert answer.verdict == Verdict.OPEN
        assert told in answer.sentence


def test_a_cold_start_without_room_answers_nothing(study: Study) -> None:
    for start in (0.05, 0.95):
        answer = CLAIM["1b"].answer(study(reward_of(gspo=0.3), start=start))
        assert answer.verdict == Verdict.OPEN
        assert "cold start" in answer.sentence


@pytest.mark.parametrize(
    ("gspo", "grpo", "verdict"),
    [(2.4e-3, 8e-4, Verdict.REPRODUCED), (8e-4, 8e-4, Verdict.NOT_REPRODUCED), (1.0, 1.0, Verdict.NOT_TESTABLE)],
)
def test_an_arm_is_stabler_where_it_collapses_at_a_higher_rate(
    study: Study, gspo: float, grpo: float, verdict: Verdict
) -> None:
    lowest = {"gspo": gspo, "grpo": grpo}
    results = study(lambda spec: {"reward/mean": 0.1 if spec.rate >= lowest.get(spec.arm, 1.0) else 0.8})
    assert CLAIM["1c"].answer(results).verdict == verdict


@pytest.mark.parametrize(
    ("times", "verdict"),
    [(100, Verdict.REPRODUCED), (10, Verdict.NOT_REPRODUCED), (1000, Verdict.NOT_REPRODUCED)],
)
def test_two_orders_of_magnitude_are_30_to_300(study: Study, times: float, verdict: Verdict) -> None:
    def make(spec: RunSpec) -> dict:
        own = 1 + 0.1 * (-1) ** spec.seed
        return {"clip/token_fraction": 2e-4 * own * (times if spec.arm == "gspo" else 1)}

    assert CLAIM["2a"].answer(study(make)).verdict == verdict


def change_rate(by_layers: Callable[[int], float]) -> Callable[[RunSpec], dict]:
    def make(spec: RunSpec) -> dict:
        rate = by_layers(MODELS[spec.model].layers) * (1 + 0.1 * (-1) ** spec.seed)
        return {"routing/change_rate_after_update_1": rate}

    return make


def test_change_that_grows_with_depth_is_told_from_change_that_does_not(study: Study) -> None:
    grows = CLAIM["4b"].answer(study(change_rate(lambda layers: 0.002 * layers)))
    assert grows.verdict == Verdict.REPRODUCED
    assert grows.estimates["a doubling of depth"].value == pytest.approx(2.0)
    assert CLAIM["4b"].answer(study(change_rate(lambda layers: 0.1 / layers))).verdict == Verdict.NOT_REPRODUCED
    assert CLAIM["4b"].answer(study(change_rate(lambda layers: 0.01))).verdict == Verdict.NOT_TESTABLE


def test_ten_percent_is_asked_of_the_deepest_model(study: Study) -> None:
    assert CLAIM["4a"].answer(study(change_rate(lambda layers: layers / 160))).verdict == Verdict.REPRODUCED
    small = CLAIM["4a"].answer(study(change_rate(lambda layers: layers / 1600)))
    assert small.verdict == Verdict.NOT_REPRODUCED
    assert small.sentence.startswith("16 layers: 1.00%")


@pytest.mark.parametrize(
    ("token", "sequence", "tokens_fluctuate", "sequences_hardly_move"),
    [
        (0.4, 0.05, Verdict.REPRODUCED, Verdict.REPRODUCED),
        (0.4, 0.4, Verdict.REPRODUCED, Verdict.NOT_REPRODUCED),
        (0.01, 0.004, Verdict.NOT_REPRODUCED, Verdict.REPRODUCED),
    ],
)
def test_the_share_that_averaging_leaves_is_the_measure_of_hardly(
    study: Study, token: float, sequence: float, tokens_fluctuate: Verdict, sequences_hardly_move: Verdict
) -> None:
    def make(spec: RunSpec) -> dict:
        own = 1 + 0.05 * (-1) ** spec.seed
        return {
            "ratio/token_routing_variance_share": token * own,
            "ratio/sequence_routing_variance_share": sequence * own,
            "ratio/token_natural_log_std": 0.02,
            "ratio/sequence_natural_log_std": 0.004,
        }

    results = study(make)
    assert CLAIM["5a"].answer(results).verdict == tokens_fluctuate
    answer = CLAIM["5b"].answer(results)
    assert answer.verdict == sequences_hardly_move
    assert "5.00 [5.00, 5.00] times narrower" in answer.sentence
    assert "3.74" in answer.sentence  # √14
    assert CLAIM["5c"].answer(results).verdict == sequences_hardly_move
    some = study(lambda spec: make(spec) if spec.model != "moe_8_long" or spec.seed < 4 else None)
    assert CLAIM["5c"].answer(some).verdict == Verdict.OPEN


@pytest.mark.parametrize(
    ("times", "verdict"),
    [(1.5, Verdict.REPRODUCED), (1.0, Verdict.NOT_TESTABLE), (0.7, Verdict.NOT_REPRODUCED)],
)
def test_sparser_experts_are_compared_in_pairs(study: Study, times: float, verdict: Verdict) -> None:
    def make(spec: RunSpec) -> dict:
        luck = 1 + 0.3 * (-1) ** spec.seed
        noise = 1 + 0.02 * spec.cold_start * (-1) ** spec.seed
        return {"routing/change_rate_after_update_1": 0.01 * luck * (times * noise if "sparse" in spec.model else 1)}

    answer = CLAIM["4c"].answer(study(make))
    assert answer.verdict == verdict
    assert f"{times:.2g}" in answer.sentence


def test_what_the_engine_costs_grpo_beyond_what_it_costs_gspo(study: Study) -> None:
    costs = reward_of(gspo_engine=-0.02, grpo_engine=-0.3)
    assert CLAIM["6b"].answer(study(costs)).verdict == Verdict.REPRODUCED
    assert CLAIM["6b"].answer(study(reward_of(gspo_engine=-0.3))).verdict == Verdict.NOT_REPRODUCED


def test_every_part_is_answered_from_nothing_and_from_the_quick_form(study: Study) -> None:
    for results in (study(lambda spec: None), study(reward_of(), experiments=QUICK)):
        answers = {claim.id: claim.answer(results) for claim in CLAIMS}
        assert answers["1a"].verdict == Verdict.OPEN
        assert all(answer.sentence for answer in answers.values())
    assert answers["1a"].sentence == "the full form of the study asks this"
    assert answers["3b"].verdict == Verdict.NOT_REPRODUCED
