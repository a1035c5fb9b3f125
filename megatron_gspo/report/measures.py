"""What a run came to, in the numbers that a comparison is made of; and paired differences between arms.

In: run records, cut at the last step that all runs have. Out: a value a run and measure, and its mean and interval over
an arm's runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_gspo.report.arms import Arm, Grouping
from megatron_gspo.report.read import RunRecord, Series
from megatron_gspo.report.statistics import Interval, mean_interval, trailing_mean
from megatron_gspo.report.warnings import SMOOTHING_STEPS, find_collapse

END_SHARE = 0.1


@dataclass(frozen=True)
class Measure:
    """One number of a run."""

    name: str
    title: str
    meaning: str
    of: Callable[[RunRecord, int, float], float | None]  # run, last step, target reward; None where it has none
    better: str = ""  # "higher" or "lower", where one is


def end_reward(run: RunRecord, until: int, target: float) -> float | None:
    """Mean reward of the last tenth of the steps."""
    del target
    reward = run.series("reward/mean").until(until)
    return float(reward.end(END_SHARE).mean()) if len(reward) else None


def best_evaluation(run: RunRecord, until: int, target: float) -> float | None:
    """Largest pass@1 of all evaluations but the one before training; None where none was made."""
    del target
    values = [run.series(name).until(until) for name in run.matching("eval/*/pass_at_1")]
    trained = [float(series.values[series.steps > 0].max()) for series in values if (series.steps > 0).any()]
    return max(trained) if trained else None


def last_evaluation(run: RunRecord, until: int, target: float) -> float | None:
    """The last evaluation's pass@1, which unlike the best is not picked."""
    del target
    values = [run.series(name).until(until) for name in run.matching("eval/*/pass_at_1")]
    trained = [float(series.values[-1]) for series in values if (series.steps > 0).any()]
    return max(trained) if trained else None


def area(run: RunRecord, until: int, target: float) -> float | None:
    """Area under the reward curve over its length in steps (trapezoids): the mean height of the curve."""
    del target
    reward = run.series("reward/mean").until(until)
    if len(reward) < 2:
        return None
    return float(np.trapezoid(reward.values, reward.steps) / (reward.steps[-1] - reward.steps[0]))


def steps_to_reward(run: RunRecord, until: int, target: float) -> float | None:
    """The first step whose reward, averaged over five steps, reaches the target; None where it never does."""
    reward = run.series("reward/mean").until(until)
    reached = np.flatnonzero(trailing_mean(reward.values, SMOOTHING_STEPS)[SMOOTHING_STEPS - 1 :] >= target)
    return float(reward.steps[SMOOTHING_STEPS - 1 :][reached[0]]) if len(reached) else None


def collapsed(run: RunRecord, until: int, target: float) -> float | None:
    """1 where the reward collapsed (`warnings.find_collapse`), else 0."""
    del target
    return float(find_collapse(run.series("reward/mean").until(until)) is not None)


def _total(name: str) -> Callable[[RunRecord, int, float], float | None]:
    def of(run: RunRecord, until: int, target: float) -> float | None:
        del target
        series: Series = run.series(name).until(until)
        return float(series.values.sum()) if len(series) else None

    return of


def _peak(name: str) -> Callable[[RunRecord, int, float], float | None]:
    def of(run: RunRecord, until: int, target: float) -> float | None:
        del target
        series = run.series(name).until(until)
        return float(series.values.max()) if len(series) else None

    return of


def route_bytes(run: RunRecord, until: int, target: float) -> float | None:
    """Bytes of recorded routes over the run: bytes a token times the tokens of the step."""
    del target
    per_token, tokens = run.series("routing/bytes_per_token").until(until), run.series("tokens").until(until)
    steps = np.intersect1d(per_token.steps, tokens.steps)
    if len(steps) == 0:
        return None
    both = [series.values[np.searchsorted(series.steps, steps)] for series in (per_token, tokens)]
    return float((both[0] * both[1]).sum())


MEASURES = (
    Measure("end_reward", "End reward", "mean reward of the last tenth of the steps", end_reward, "higher"),
    Measure(
        "best_evaluation",
        "Best evaluation",
        "largest held-out pass@1; picked, so it flatters",
        best_evaluation,
        "higher",
    ),
    Measure("last_evaluation", "Last evaluation", "held-out pass@1 of the last evaluation", last_evaluation, "higher"),
    Measure("area", "Area under the curve", "mean height of the reward curve", area, "higher"),
    Measure(
        "steps_to_reward",
        "Steps to the reward",
        "first step at which five steps' mean reward reaches the target",
        steps_to_reward,
        "lower",
    ),
    Measure("collapsed", "Collapses", "share of runs whose reward collapsed", collapsed, "lower"),
    Measure(
        "clip_fraction",
        "Clipped tokens",
        "mean share of response tokens that were clipped",
        lambda r, u, t: _mean(r, "clip/token_fraction", u),
    ),
    Measure(
        "change_rate",
        "Change rate",
        "mean share of activated experts that change in a step",
        lambda r, u, t: _mean(r, "routing/change_rate", u),
    ),
    Measure("time_s", "Time, s", "wall-clock seconds of all steps", _total("time/step_s"), "lower"),
    Measure("tokens", "Tokens", "prompt and response tokens sampled", _total("tokens")),
    Measure("peak_gib", "Peak memory, GiB", "of the first rank", _peak("memory/peak_gib"), "lower"),
    Measure("route_bytes", "Bytes of routes", "recorded for measurement or replay, over the run", route_bytes, "lower"),
)


@dataclass(frozen=True)
class ArmResult:
    """An arm's runs and their mean, measure by measure."""

    values: dict[str, list[float | None]]  # measure -> a value a run, in the order of `Arm.runs`
    means: dict[str, Interval | None]  # over the runs that have a value; None where none has


@dataclass(frozen=True)
class PairedDifference:
    """An arm minus the first one, over the seeds that both have a value for."""

    arm: str
    baseline: str
    measure: str
    difference: Interval


def arm_result(arm: Arm, until: int, target: float) -> ArmResult:
    """Every measure of every run of the arm."""
    values = {measure.name: [measure.of(run, until, target) for run in arm.runs.values()] for measure in MEASURES}
    known = {name: np.array([value for value in row if value is not None]) for name, row in values.items()}
    return ArmResult(values, {name: mean_interval(row) if len(row) else None for name, row in known.items()})


def paired_differences(grouping: Grouping, results: list[ArmResult]) -> list[PairedDifference]:
    """Each arm against the first, paired by seed (and cold start)."""
    baseline, *others = grouping.arms
    found = []
    for arm, result in zip(others, results[1:], strict=True):
        for measure in MEASURES:
            first = dict(zip(baseline.runs, results[0].values[measure.name], strict=True))
            differences = [
                value - before
                for key, value in zip(arm.runs, result.values[measure.name], strict=True)
                if value is not None and (before := first.get(key)) is not None
            ]
            if differences:
                interval = mean_interval(np.array(differences))
                found.append(PairedDifference(arm.name, baseline.name, measure.name, interval))
    return found


def default_target(runs: list[RunRecord], until: int) -> float:
    """Half-way from the mean reward of the runs' first tenths to the highest mean of their last tenths."""
    reward = [run.series("reward/mean").until(until) for run in runs]
    starts = [float(series.start(END_SHARE).mean()) for series in reward if len(series)]
    ends = [float(series.end(END_SHARE).mean()) for series in reward if len(series)]
    return (float(np.mean(starts)) + max(ends)) / 2 if ends else 0.0


def _mean(run: RunRecord, name: str, until: int) -> float | None:
    series = run.series(name).until(until)
    return float(series.values.mean()) if len(series) else None
