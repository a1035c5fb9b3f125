"""What the paper claims, and the rule by which each part is answered. The rules were written down before the results.

In: `measure.Results`. Out: an `Answer` a part: a verdict, the estimates it rests on, and one sentence.

    reproduced               the rule's condition holds, with its interval
    not reproduced           its opposite holds, with its interval
    not testable at this size   the runs are there, and their interval allows both
    not answered yet         fewer than five replicates, or one cold start only, have run

A difference in reward below `MARGIN` is none: an interval that ends below it says that there is no advantage, one that
ends above and holds 0 says nothing. Every interval is over replicates (seed × cold start); `intervals.py` says how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from tools.reproduce.intervals import Estimate, mean_of, ratio_of_means, slope
from tools.reproduce.measure import Outcome, Results, paired
from tools.reproduce.study import ARMS, COMMON_RATE, LEARNING_RATES, MODELS, Replicate

MARGIN = 0.03
MIN_REPLICATES = 5
MIN_COLD_STARTS = 2
STARTS_BETWEEN = (
    0.2,
    0.85,
)  # pass@1 of a cold start: below, nothing is sampled that could be reinforced; above, no room

TWO_ORDERS = (30.0, 300.0)
ABOUT_TEN_PERCENT = (0.05, 0.20)
LEAST_ROUTING_SHARE = 0.10
HARDLY = 0.5


class Verdict(StrEnum):
    """The four answers."""

    REPRODUCED = "reproduced"
    NOT_REPRODUCED = "not reproduced"
    NOT_TESTABLE = "not testable at this size"
    OPEN = "not answered yet"


@dataclass(frozen=True)
class Answer:
    """What a part of a claim came to."""

    verdict: Verdict
    sentence: str
    estimates: Mapping[str, Estimate] = field(default_factory=dict)  # by what they are of


@dataclass(frozen=True)
class Claim:
    """A part of one of the paper's claims."""

    id: str
    text: str
    source: str
    rule: str
    answer: Callable[[Results], Answer]


def _too_few(replicates: list[Replicate]) -> str | None:
    cold_starts = {cold_start for _, cold_start in replicates}
    if len(replicates) >= MIN_REPLICATES and len(cold_starts) >= MIN_COLD_STARTS:
        return None
    return (
        f"{len(replicates)} replicates of {len(cold_starts)} cold starts have run; the rule asks for "
        f"{MIN_REPLICATES} of {MIN_COLD_STARTS}"
    )


def _reward_difference(
    results: Results, experiment: str, arm: str, baseline: str, value: Callable[[Outcome], float]
) -> tuple[Estimate | None, str | None]:
    """Mean paired difference of `value`, arm minus baseline; and why it cannot be judged, where it cannot."""
    one, other = results.of(experiment, arm), results.of(experiment, baseline)
    pairs = paired(one, other, value)
    estimate = mean_of([a - b for a, b in pairs.values()]) if pairs else None
    problem = _too_few(list(pairs))
    starts = [one[key].start for key in pairs]
    if problem is None and not all(STARTS_BETWEEN[0] <= start <= STARTS_BETWEEN[1] for start in starts):
        problem = f"a cold start's pass@1 is outside of {STARTS_BETWEEN[0]} to {STARTS_BETWEEN[1]}"
    return estimate, problem


def is_ahead(
    experiment: str, arm: str, baseline: str, value: Callable[[Outcome], float]
) -> Callable[[Results], Answer]:
    """Reproduced where the arm is ahead for certain; not where it is for certain not ahead by `MARGIN`."""

    def answer(results: Results) -> Answer:
        difference, problem = _reward_difference(results, experiment, arm, baseline, value)
        label = f"{ARMS[arm].title} − {ARMS[baseline].title}"
        if difference is None or problem is not None:
            estimates = {label: difference} if difference is not None else {}
            return Answer(Verdict.OPEN, problem or "no pair of runs has ended", estimates)
        verdict = Verdict.NOT_TESTABLE
        if difference.surely_above(0.0):
            verdict = Verdict.REPRODUCED
        elif difference.surely_below(MARGIN):
            verdict = Verdict.NOT_REPRODUCED
        return Answer(verdict, f"reward {label}: {shown(difference, signed=True)}", {label: difference})

    return answer


def is_not_behind(
    experiment: str, arm: str, baseline: str, value: Callable[[Outcome], float]
) -> Callable[[Results], Answer]:
    """Reproduced where the arm is for certain not behind by `MARGIN`; not where it is behind for certain."""

    def answer(results: Results) -> Answer:
        difference, problem = _reward_difference(results, experiment, arm, baseline, value)
        label = f"{ARMS[arm].title} − {ARMS[baseline].title}"
        if difference is None or problem is not None:
            estimates = {label: difference} if difference is not None else {}
            return Answer(Verdict.OPEN, problem or "no pair of runs has ended", estimates)
        verdict = Verdict.NOT_TESTABLE
        if difference.surely_below(0.0):
            verdict = Verdict.NOT_REPRODUCED
        elif difference.surely_above(-MARGIN):
            verdict = Verdict.REPRODUCED
        return Answer(verdict, f"reward {label}: {shown(difference, signed=True)}", {label: difference})

    return answer


def lowest_collapse(results: Results, experiment: str, arm: str) -> dict[Replicate, float]:
    """The lowest rate of the sweep at which each replicate collapsed, infinite for none; of replicates swept wholly."""
    by_rate = {rate: results.of(experiment, arm, rate=rate) for rate in LEARNING_RATES}
    replicates = [key for key in by_rate[LEARNING_RATES[0]] if all(key in runs for runs in by_rate.values())]
    return {
        key: min((rate for rate, runs in by_rate.items() if runs[key].collapsed), default=np.inf)
        for key in sorted(replicates)
    }


def collapses_later(arm: tuple[str, str], baseline: tuple[str, str]) -> Callable[[Results], Answer]:
    """Reproduced where the arm's lowest collapsing rate is higher in every replicate; not where it is in none."""

    def answer(results: Results) -> Answer:
        one, other = lowest_collapse(results, *arm), lowest_collapse(results, *baseline)
        keys = [key for key in one if key in other]
        if len(keys) < MIN_COLD_STARTS:
            return Answer(Verdict.OPEN, f"the sweep has ended for {len(keys)} of {MIN_COLD_STARTS} cold starts")
        later = [one[key] > other[key] for key in keys]
        told = "; ".join(
            f"{_arm_of(*where)}: {', '.join(_rate(found[key]) for key in keys)}"
            for where, found in ((arm, one), (baseline, other))
        )
        verdict = Verdict.NOT_TESTABLE
        if all(np.isinf(found[key]) for found in (one, other) for key in keys):
            return Answer(verdict, f"neither collapses up to {LEARNING_RATES[-1]:g}")
        if all(later):
            verdict = Verdict.REPRODUCED
        elif not any(later):
            verdict = Verdict.NOT_REPRODUCED
        return Answer(verdict, f"lowest rate that collapses, by cold start: {told}")

    return answer


def _arm_of(experiment: str, arm: str) -> str:
    return f"{ARMS[arm].title}{', dense' if experiment == 'dense' else ''}"


def _rate(rate: float) -> str:
    return "none" if np.isinf(rate) else f"{rate:g}"


def clip_ratio(
    results: Results, arms: tuple[tuple[str, str], tuple[str, str]]
) -> tuple[Estimate | None, int, str | None]:
    """Clip fraction of the first (experiment, arm) over that of the second; pairs; why it cannot be judged."""
    (one, other) = (results.of(*where) for where in arms)
    pairs = paired(one, other, lambda run: run.mean("clip/token_fraction"))
    problem = _too_few(list(pairs))
    if not pairs:
        return None, 0, problem
    return ratio_of_means(*zip(*pairs.values(), strict=True)), len(pairs), problem


def clips_more(results: Results) -> Answer:
    """Claim 2, each at its own range."""
    ratio, _, problem = clip_ratio(results, (("common", "gspo"), ("common", "grpo")))
    label = "clip fraction, GSPO over GRPO"
    if ratio is None or problem is not None:
        return Answer(Verdict.OPEN, problem or "GRPO never clipped", {label: ratio} if ratio is not None else {})
    verdict = Verdict.NOT_TESTABLE
    if ratio.surely_within(*TWO_ORDERS):
        verdict = Verdict.REPRODUCED
    elif ratio.surely_below(TWO_ORDERS[0]) or ratio.surely_above(TWO_ORDERS[1]):
        verdict = Verdict.NOT_REPRODUCED
    share = [
        f"{mean_of([run.mean('clip/token_fraction') for run in results.of('common', arm).values()]).value:.2%}"
        for arm in ("gspo", "grpo")
    ]
    return Answer(verdict, f"GSPO {share[0]} of tokens, GRPO {share[1]}: {shown(ratio)} times", {label: ratio})


def clips_more_whatever_the_range(results: Results) -> Answer:
    """Claim 2, with one objective's range brought to the other's scale."""
    cases = {
        "GSPO over tight GRPO": (("common", "gspo"), ("clip", "grpo_tight")),
        "wide GSPO over GRPO": (("clip", "gspo_wide"), ("common", "grpo")),
    }
    found = {label: clip_ratio(results, arms) for label, arms in cases.items()}
    estimates = {label: ratio for label, (ratio, _, _) in found.items() if ratio is not None}
    problem = next((problem for _, _, problem in found.values() if problem is not None), None)
    if problem is not None or len(estimates) < len(cases):
        return Answer(Verdict.OPEN, problem or "an arm never clipped", estimates)
    verdict = Verdict.NOT_TESTABLE
    if all(ratio.surely_within(*TWO_ORDERS) for ratio in estimates.values()):
        verdict = Verdict.REPRODUCED
    elif any(ratio.surely_below(TWO_ORDERS[0]) or ratio.surely_above(TWO_ORDERS[1]) for ratio in estimates.values()):
        verdict = Verdict.NOT_REPRODUCED
    told = "; ".join(f"{label} {shown(ratio)} times" for label, ratio in estimates.items())
    return Answer(verdict, told, estimates)


AFTER_ONE = "routing/change_rate_after_update_1"


def change_by_depth(results: Results, metric: str = AFTER_ONE) -> dict[int, dict[Replicate, float]]:
    """Change rates of GRPO at the common rate by number of MoE layers; replicates that every depth has."""
    runs = {model.layers: results.of("depth", "grpo", model=name) for name, model in MODELS.items() if not model.dense}
    runs[MODELS["moe_8"].layers] = results.of("common", "grpo")
    runs = {layers: found for layers, found in runs.items() if found}
    common = set.intersection(*(set(found) for found in runs.values())) if runs else set()
    return {layers: {key: runs[layers][key].mean(metric) for key in sorted(common)} for layers in sorted(runs)}


def ten_percent_change(results: Results) -> Answer:
    """Claim 4's size, in the deepest model that has run."""
    rates = {layers: list(found.values()) for layers, found in change_by_depth(results).items() if found}
    if not rates or len(next(iter(rates.values()))) < MIN_COLD_STARTS:
        return Answer(Verdict.OPEN, "fewer than two replicates have run at every depth")
    deepest = max(rates)
    estimates = {f"{layers} layers": mean_of(found) for layers, found in rates.items()}
    rate = estimates[f"{deepest} layers"]
    verdict = Verdict.NOT_TESTABLE
    if rate.surely_within(*ABOUT_TEN_PERCENT):
        verdict = Verdict.REPRODUCED
    elif rate.surely_below(ABOUT_TEN_PERCENT[0]) or rate.surely_above(ABOUT_TEN_PERCENT[1]):
        verdict = Verdict.NOT_REPRODUCED
    floor = np.mean([run.mean("routing/noise_floor") for run in results.of("common", "grpo").values()])
    told = f"{deepest} layers: {shown(rate, percent=True)} of the activated experts after one update"
    return Answer(verdict, f"{told}; noise floor {floor:.2%}", estimates)


def more_change_in_deeper_models(results: Results) -> Answer:
    """Claim 4's trend."""
    rates = change_by_depth(results)
    groups = [
        (float(np.log2(layers)), np.log2(list(found.values())).tolist()) for layers, found in rates.items() if found
    ]
    if len(groups) < 2 or len(groups[0][1]) < MIN_COLD_STARTS:
        return Answer(Verdict.OPEN, "fewer than two depths with two replicates have run")
    trend = slope(groups)
    verdict = Verdict.NOT_TESTABLE
    if trend.surely_above(0.0):
        verdict = Verdict.REPRODUCED
    elif trend.surely_below(0.0):
        verdict = Verdict.NOT_REPRODUCED
    means = ", ".join(f"{layers}: {np.mean(list(found.values())):.2%}" for layers, found in rates.items())
    factor = Estimate(2**trend.value, 2**trend.low, 2**trend.high, trend.count)
    return Answer(
        verdict, f"times {shown(factor)} for each doubling of depth; {means}", {"a doubling of depth": factor}
    )


def _shares(results: Results) -> tuple[dict[str, list[float]], str | None]:
    runs = results.of("common", "grpo")
    names = {
        "token": "ratio/token_routing_variance_share",
        "sequence": "ratio/sequence_routing_variance_share",
        "changed": "ratio/token_log_std_changed",
        "unchanged": "ratio/token_log_std_unchanged",
        "token_std": "ratio/token_natural_log_std",
        "sequence_std": "ratio/sequence_natural_log_std",
        "length": "response/length_mean",
    }
    return {key: [run.mean(name) for run in runs.values()] for key, name in names.items()}, _too_few(list(runs))


def routing_moves_token_ratios(results: Results) -> Answer:
    """Claim 5, tokens."""
    values, problem = _shares(results)
    if problem is not None:
        return Answer(Verdict.OPEN, problem)
    share = mean_of(values["token"])
    wider = ratio_of_means(values["changed"], values["unchanged"])
    verdict = Verdict.NOT_TESTABLE
    if share.surely_above(LEAST_ROUTING_SHARE):
        verdict = Verdict.REPRODUCED
    elif share.surely_below(LEAST_ROUTING_SHARE):
        verdict = Verdict.NOT_REPRODUCED
    estimates = {"routing's share of the variance of log w": share}
    told = f"routing makes {shown(share, percent=True)} of the variance of log w"
    if wider is not None:
        estimates["spread of log w, rerouted tokens over others"] = wider
        told += f"; rerouted tokens' log w is spread {shown(wider)} times as wide as others'"
    return Answer(verdict, told, estimates)


def routing_hardly_moves_sequences(results: Results) -> Answer:
    """Claim 5, sequences: beyond what averaging independent tokens does, which leaves the share as it is."""
    values, problem = _shares(results)
    if problem is not None:
        return Answer(Verdict.OPEN, problem)
    ratio = ratio_of_means(values["sequence"], values["token"])
    if ratio is None:
        return Answer(Verdict.NOT_TESTABLE, "routing moved no token's ratio")
    verdict = Verdict.NOT_TESTABLE
    if ratio.surely_below(HARDLY):
        verdict = Verdict.REPRODUCED
    elif ratio.surely_above(HARDLY):
        verdict = Verdict.NOT_REPRODUCED
    narrower = ratio_of_means(values["token_std"], values["sequence_std"])
    told = (
        f"routing's share of the variance of log s is {shown(mean_of(values['sequence']), percent=True)}, "
        f"{shown(ratio)} of its share in log w"
    )
    estimates = {"routing's share in log s over that in log w": ratio}
    if narrower is not None:
        root = float(np.sqrt(np.mean(values["length"])))
        told += (
            f"; log s is spread {shown(narrower)} times narrower than log w (averaging independent tokens: {root:.2f})"
        )
        estimates["spread of log w over log s"] = narrower
    return Answer(verdict, told, estimates)


def engine_suffices_for_gspo(results: Results) -> Answer:
    """Claim 6 for GSPO at the paper's clip range, with the range against the mismatch."""
    answer = is_not_behind("engine", "gspo_engine", "gspo_bf16", mean_reward)(results)
    runs = results.of("engine", "gspo_engine")
    if not runs:
        return answer
    mismatch = mean_of([run.mean("mismatch/sequence_log_std") for run in runs.values()])
    clipped = np.mean([run.mean("clip/token_fraction") for run in runs.values()])
    told = (
        f"{answer.sentence}; at equal weights log s is spread by {mismatch.value:.2g}, {mismatch.value / 3e-4:.0f} times "
        f"the clip range of 3e-4, and {clipped:.0%} of tokens are clipped"
    )
    return Answer(answer.verdict, told, {**answer.estimates, "spread of log s at equal weights": mismatch})


def engine_costs_grpo_more(results: Results) -> Answer:
    """Claim 6, the contrast: what the engine's likelihoods change for GSPO minus what they change for GRPO."""
    arms = ("gspo_engine", "gspo_bf16", "grpo_engine", "grpo_bf16")
    runs = [results.of("engine", arm) for arm in arms]
    keys = [key for key in runs[0] if all(key in found for found in runs)]
    problem = _too_few(keys)
    values = [[found[key].mean_reward for key in keys] for found in runs]
    contrast = [(a - b) - (c - d) for a, b, c, d in zip(*values, strict=True)]
    label = "change of GSPO − change of GRPO"
    if problem is not None:
        return Answer(Verdict.OPEN, problem, {label: mean_of(contrast)} if contrast else {})
    difference = mean_of(contrast)
    verdict = Verdict.NOT_TESTABLE
    if difference.surely_above(0.0):
        verdict = Verdict.REPRODUCED
    elif difference.surely_below(MARGIN):
        verdict = Verdict.NOT_REPRODUCED
    of_grpo = mean_of([c - d for c, d in zip(values[2], values[3], strict=True)])
    told = f"reward, {label}: {shown(difference, signed=True)}; GRPO alone: {shown(of_grpo, signed=True)}"
    return Answer(verdict, told, {label: difference, "GRPO, engine's − trainer's": of_grpo})


def mean_reward(run: Outcome) -> float:
    """Mean reward over all steps: efficiency."""
    return run.mean_reward


def end_reward(run: Outcome) -> float:
    """Mean reward of the last quarter: where training went."""
    return run.end_reward


def shown(estimate: Estimate, *, signed: bool = False, percent: bool = False) -> str:
    """A number with its bootstrap interval."""

    def text(value: float) -> str:
        if percent:
            return f"{value:.2%}" if abs(value) < 0.1 else f"{value:.0%}"
        plain = f"{value:.3f}" if abs(value) < 1 else f"{value:.3g}"
        return f"+{plain}" if signed and value > 0 else plain

    return f"{text(estimate.value)} [{text(estimate.low)}, {text(estimate.high)}]"


_AHEAD = f"reproduced: the interval lies above 0; not reproduced: it lies below +{MARGIN}; else not testable"
_NOT_BEHIND = f"reproduced: the interval lies above −{MARGIN}; not reproduced: it lies below 0; else not testable"

CLAIMS = (
    Claim(
        "1a",
        "GSPO is more efficient than GRPO, each at its best learning rate",
        "Figure 1, §5.1",
        f"mean reward over all steps, GSPO − GRPO, rates chosen on seeds of their own. {_AHEAD}",
        is_ahead("best", "gspo", "grpo", mean_reward),
    ),
    Claim(
        "1b",
        f"GSPO is more efficient than GRPO at a common learning rate ({COMMON_RATE:g})",
        "Figure 1, §5.1",
        f"mean reward over all steps, GSPO − GRPO. {_AHEAD}",
        is_ahead("common", "gspo", "grpo", mean_reward),
    ),
    Claim(
        "1c",
        "GSPO stays stable at higher learning rates than GRPO",
        "Figure 1, §5.1",
        "lowest rate of the sweep at which a run collapses (ends below where it started). reproduced: GSPO's is higher from "
        "every cold start; not reproduced: from none; else not testable",
        collapses_later(("sweep", "gspo"), ("sweep", "grpo")),
    ),
    Claim(
        "1d",
        "GSPO stays stable where responses are far off-policy (16 updates a step)",
        "§4.2, §5.1",
        f"end reward, GSPO − GRPO. {_AHEAD}",
        is_ahead("off_policy", "gspo", "grpo", end_reward),
    ),
    Claim(
        "1e",
        "It is the sequence-level ratio that helps, not a smaller trust region (16 updates a step)",
        "control",
        f"end reward, GSPO − GRPO with a clip range as tight. {_AHEAD}",
        is_ahead("off_policy", "gspo", "grpo_tight", end_reward),
    ),
    Claim(
        "2a",
        "GSPO clips about two orders of magnitude more tokens than GRPO",
        "Figure 2, §5.2",
        "clip fraction, GSPO over GRPO, each at its range. reproduced: the interval lies within 30 to 300; not reproduced: "
        "outside; else not testable",
        clips_more,
    ),
    Claim(
        "2b",
        "Adjusting the clip ranges does not alter that",
        "§5.2",
        "the same with GRPO's range as tight as GSPO's, and GSPO's as wide as GRPO's. reproduced: both within 30 to 300; not "
        "reproduced: one outside; else not testable",
        clips_more_whatever_the_range,
    ),
    Claim(
        "3a",
        "GRPO needs Routing Replay on a MoE, each at its best learning rate",
        "Figure 3, §5.3",
        f"end reward, GRPO + R2 − GRPO. {_AHEAD}",
        is_ahead("best", "grpo_r2", "grpo", end_reward),
    ),
    Claim(
        "3b",
        f"GRPO needs Routing Replay on a MoE, at a common learning rate ({COMMON_RATE:g})",
        "Figure 3, §5.3",
        f"end reward, GRPO + R2 − GRPO. {_AHEAD}",
        is_ahead("common", "grpo_r2", "grpo", end_reward),
    ),
    Claim(
        "3c",
        "GRPO needs Routing Replay where responses are far off-policy (16 updates a step)",
        "Figure 3, §5.3",
        f"end reward, GRPO + R2 − GRPO. {_AHEAD}",
        is_ahead("off_policy", "grpo_r2", "grpo", end_reward),
    ),
    Claim(
        "3d",
        "GSPO does not need Routing Replay",
        "§5.3",
        f"end reward at the common rate, GSPO − (GSPO + R2). {_NOT_BEHIND}",
        is_not_behind("common", "gspo", "gspo_r2", end_reward),
    ),
    Claim(
        "3e",
        "It is the routing: GRPO on a dense model of equal size stays stable at higher learning rates",
        "control",
        "lowest rate of the sweep at which GRPO collapses. reproduced: the dense model's is higher from every cold start; not "
        "reproduced: from none; else not testable",
        collapses_later(("dense", "grpo"), ("sweep", "grpo")),
    ),
    Claim(
        "4a",
        "About 10% of the activated experts change after one update",
        "§5.3",
        "mean change rate after the first update of a step, GRPO at the common rate, deepest model. reproduced: the interval "
        "lies within 5% to 20%; not reproduced: outside; else not testable. At least two replicates",
        ten_percent_change,
    ),
    Claim(
        "4b",
        "More change in deeper models (2, 4, 8, 16 layers)",
        "§5.3",
        "slope of log₂ of that rate over log₂ of the depth, replicates that every depth has. reproduced: the interval lies "
        "above 0; not reproduced: below; else not testable. At least two replicates",
        more_change_in_deeper_models,
    ),
    Claim(
        "5a",
        "Routing change makes token ratios fluctuate",
        "§5.3",
        "routing's share of the variance of log w (old routes replayed against natural), GRPO at the common rate. reproduced: "
        "the interval lies above 10%; not reproduced: below; else not testable",
        routing_moves_token_ratios,
    ),
    Claim(
        "5b",
        "and hardly moves sequence likelihoods",
        "§5.3",
        "routing's share of the variance of log s over its share of that of log w; averaging independent tokens leaves it at "
        "1. reproduced: the interval lies below 0.5; not reproduced: above; else not testable",
        routing_hardly_moves_sequences,
    ),
    Claim(
        "6a",
        "The engine's likelihoods suffice for GSPO",
        "§5.4",
        f"mean reward over all steps with a bfloat16 engine, its likelihoods − the trainer's. {_NOT_BEHIND}",
        engine_suffices_for_gspo,
    ),
    Claim(
        "6b",
        "and cost GRPO more",
        "§5.4",
        f"what they change for GSPO − what they change for GRPO. {_AHEAD}",
        engine_costs_grpo_more,
    ),
    Claim(
        "6c",
        "They suffice for GSPO where the clip range is wider than the mismatch",
        "control",
        f"mean reward over all steps, GSPO with the engine's likelihoods and a range of 0.03 − with the trainer's. {_NOT_BEHIND}",
        is_not_behind("engine", "gspo_engine_wide", "gspo_bf16", mean_reward),
    ),
)
