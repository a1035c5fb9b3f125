"""Means over replicates with intervals: paired differences, ratios of means, slopes. Pure functions of numpy arrays.

The interval is the bootstrap's: replicates (seed × cold start) are drawn with replacement, and the middle 95% of what
comes out is given. With ten replicates it is somewhat too narrow, so a mean's Student interval stands beside it, and a
rule that calls for certainty asks both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_gspo.report.statistics import mean_interval

DRAWS = 10_000
TAIL_PERCENT = 2.5


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% bootstrap interval; for a mean also Student's."""

    value: float
    low: float
    high: float
    count: int  # replicates
    student_low: float | None = None
    student_high: float | None = None

    def surely_above(self, bound: float) -> bool:
        """Whether every interval there is lies above."""
        return min(self.low, self.low if self.student_low is None else self.student_low) > bound

    def surely_below(self, bound: float) -> bool:
        """Whether every interval there is lies below."""
        return max(self.high, self.high if self.student_high is None else self.student_high) < bound

    def surely_within(self, low: float, high: float) -> bool:
        """Whether every interval there is lies between."""
        return self.surely_above(low) and self.surely_below(high)


def mean_of(values: Sequence[float] | np.ndarray) -> Estimate:
    """Mean of one number a replicate, at least one."""
    values = np.asarray(values, dtype=float)
    student = mean_interval(values)
    low, high = _bootstrap([values], lambda draws: draws[0].mean(1))
    return Estimate(float(values.mean()), low, high, len(values), student.low, student.high)


def ratio_of_means(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate | None:
    """Σ numerators / Σ denominators, of the same replicates, drawn in pairs. None where the denominators are all 0."""
    pairs = np.stack([np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)], axis=1)
    if pairs[:, 1].sum() <= 0:
        return None

    def ratio(draws: list[np.ndarray]) -> np.ndarray:
        sums = draws[0].sum(1)
        return np.divide(sums[:, 0], sums[:, 1], out=np.full(len(sums), np.inf), where=sums[:, 1] > 0)

    low, high = _bootstrap([pairs], ratio)
    return Estimate(float(pairs[:, 0].sum() / pairs[:, 1].sum()), low, high, len(pairs))


def slope(groups: Sequence[tuple[float, Sequence[float]]]) -> Estimate:
    """Least-squares slope of y over x, groups of replicates at each x weighing the same. Each group is drawn by itself."""
    x = np.array([at for at, _ in groups], dtype=float)
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    values = [np.asarray(ys, dtype=float) for _, ys in groups]

    def slopes(draws: list[np.ndarray]) -> np.ndarray:
        return np.stack([group.mean(1) for group in draws], axis=1) @ weights

    low, high = _bootstrap(values, slopes)
    value = float(np.array([group.mean() for group in values]) @ weights)
    return Estimate(value, low, high, sum(len(group) for group in values))


def _bootstrap(
    groups: Sequence[np.ndarray], statistic: Callable[[list[np.ndarray]], np.ndarray]
) -> tuple[float, float]:
    """Middle 95% of `statistic` of groups [replicates, ...] drawn with replacement: [draws, replicates, ...] each."""
    rng = np.random.default_rng(0)
    draws = [group[rng.integers(len(group), size=(DRAWS, len(group)))] for group in groups]
    low, high = np.percentile(statistic(draws), [TAIL_PERCENT, 100 - TAIL_PERCENT], method="nearest")
    return float(low), float(high)
