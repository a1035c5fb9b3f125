"""Rules about reward: is an arm ahead, is it not behind, at which learning rate does it collapse. Claims 1, 3 and 6.

In: results. Out: answers. Every difference is paired by replicate.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tools.reproduce.answers import MARGIN, MIN_COLD_STARTS, Answer, Verdict, shown, too_few
from tools.reproduce.intervals import Estimate, mean_of
from tools.reproduce.measure import Outcome, Results, paired
from tools.reproduce.plan import RUN_CPU_S
from tools.reproduce.study import ARMS, LEARNING_RATES, Replicate

#: pass@1 of a cold start: below, nothing is sampled that could be reinforced; above, there is no room.
STARTS_BETWEEN = (0.2, 0.85)


def mean_reward(run: Outcome) -> float:
    """Mean reward over all steps: efficiency."""
    return run.mean_reward


def end_reward(run: Outcome) -> float:
    """Mean reward of the last quarter: where training went."""
    return run.end_reward


def _reward_difference(
    results: Results, experiment: str, arm: str, baseline: str, value: Callable[[Outcome], float]
) -> tuple[Estimate | None, str | None]:
    """Mean paired difference of `value`, arm minus baseline; and why it cannot be judged, where it cannot."""
    one, other = results.of(experiment, arm), results.of(experiment, baseline)
    pairs = paired(one, other, value)
    estimate = mean_of([a - b for a, b in pairs.values()]) if pairs else None
    problem = too_few(list(pairs))
    starts = [one[key].start for key in pairs]
    if problem is None and not all(STARTS_BETWEEN[0] <= start <= STARTS_BETWEEN[1] for start in starts):
        problem = f"a cold start's pass@1 is outside of {STARTS_BETWEEN[0]} to {STARTS_BETWEEN[1]}"
    return estimate, problem


Judge = Callable[[Estimate], Verdict]


def judge_ahead(difference: Estimate) -> Verdict:
    """Not reproduced where the arm is for certain not ahead by `MARGIN`; else reproduced where it is ahead for certain."""
    if difference.surely_below(MARGIN):
        return Verdict.NOT_REPRODUCED
    return Verdict.REPRODUCED if difference.surely_above(0.0) else Verdict.NOT_TESTABLE


def judge_not_behind(difference: Estimate) -> Verdict:
    """Reproduced where the arm is for certain not behind by `MARGIN`; else not where it is behind for certain."""
    if difference.surely_above(-MARGIN):
        return Verdict.REPRODUCED
    return Verdict.NOT_REPRODUCED if difference.surely_below(0.0) else Verdict.NOT_TESTABLE


def is_ahead(
    experiment: str, arm: str, baseline: str, value: Callable[[Outcome], float]
) -> Callable[[Results], Answer]:
    """The rule that the arm is ahead of the baseline, in pairs."""
    return _compared(experiment, arm, baseline, value, judge_ahead)


def is_not_behind(
    experiment: str, arm: str, baseline: str, value: Callable[[Outcome], float]
) -> Callable[[Results], Answer]:
    """The rule that the arm is not behind the baseline, in pairs."""
    return _compared(experiment, arm, baseline, value, judge_not_behind)


def _compared(
    experiment: str, arm: str, baseline: str, value: Callable[[Outcome], float], judge: Judge
) -> Callable[[Results], Answer]:
    def answer(results: Results) -> Answer:
        difference, problem = _reward_difference(results, experiment, arm, baseline, value)
        label = f"{ARMS[arm].title} − {ARMS[baseline].title}"
        if difference is None or problem is not None:
            estimates = {label: difference} if difference is not None else {}
            return Answer(Verdict.OPEN, problem or "no pair of runs has ended", estimates)
        verdict = judge(difference)
        told = f"reward {label}: {shown(difference, signed=True)}"
        if verdict == Verdict.NOT_TESTABLE:
            told += f"; {what_it_would_take(difference)}"
        return Answer(verdict, told, {label: difference})

    return answer


def what_it_would_take(difference: Estimate) -> str:
    """Replicates until the interval is as narrow as the margin, if it narrows as 1/√n, and the CPU time of their two arms."""
    half = (difference.high - difference.low) / 2
    if difference.student_low is not None and difference.student_high is not None:
        half = max(half, (difference.student_high - difference.student_low) / 2)
    needed = math.ceil(difference.count * (half / MARGIN) ** 2)
    return f"some {needed} replicates ({2 * needed * RUN_CPU_S / 3600:.1f} hours of CPU) would bring it to ±{MARGIN}"


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
    problem = too_few(keys)
    values = [[found[key].mean_reward for key in keys] for found in runs]
    contrast = [(a - b) - (c - d) for a, b, c, d in zip(*values, strict=True)]
    label = "change of GSPO − change of GRPO"
    if problem is not None:
        return Answer(Verdict.OPEN, problem, {label: mean_of(contrast)} if contrast else {})
    difference = mean_of(contrast)
    of_grpo = mean_of([c - d for c, d in zip(values[2], values[3], strict=True)])
    told = f"reward, {label}: {shown(difference, signed=True)}; GRPO alone: {shown(of_grpo, signed=True)}"
    return Answer(judge_ahead(difference), told, {label: difference, "GRPO, engine's − trainer's": of_grpo})
