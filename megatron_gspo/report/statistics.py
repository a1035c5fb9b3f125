"""The few statistics that reports need: smoothing, noise, intervals. Pure functions of numpy arrays."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

BOOTSTRAP_SAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval; `low` and `high` are None where one value, or equal ones, say nothing of the spread."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether there is an interval, and 0 lies outside of it."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def trailing_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of each value and the up to `window` - 1 before it: [n] float64."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def noise_std(values: np.ndarray) -> float:
    """Spread of `values` about a slow trend, from the median difference of neighbours; 0 for fewer than two values.

    Differences of independent values are √2 wider than the values, and a normal one's median magnitude is 0.6745 σ.
    """
    if len(values) < 2:
        return 0.0
    return float(np.median(np.abs(np.diff(values)))) / (0.6745 * np.sqrt(2.0))


def bootstrap_band(curves: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray] | None:
    """95% percentile bootstrap band of the mean of `curves` [seeds, steps]; whole curves are drawn, so steps stay together.

    Returns low and high, [steps] each; None for a single curve. With few seeds such a band is too narrow: it shows where
    the seeds lie, and tests nothing.
    """
    num_curves = len(curves)
    if num_curves < 2:
        return None
    draws = np.random.default_rng(seed).integers(num_curves, size=(BOOTSTRAP_SAMPLES, num_curves))
    weights = np.stack([(draws == curve).mean(1) for curve in range(num_curves)], axis=1)  # [samples, seeds]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(weights @ curves, [tail, 100 - tail], axis=0)
    return low, high


def mean_interval(values: np.ndarray) -> Interval:
    """Mean of `values` [n], n >= 1, with Student's 95% interval, which is honest for the few seeds one has."""
    mean, count = float(values.mean()), len(values)
    if count < 2 or values.min() == values.max():
        return Interval(mean, None, None, count)
    half = student_t_quantile(count - 1) * float(values.std(ddof=1)) / np.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


@cache
def student_t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t that |T| stays below with probability `confidence`.

    With t = √ν tan u the density of T becomes cos^(ν-1) u, which is summed up over [0, π/2].
    """
    u = np.linspace(0.0, np.pi / 2, 200_001)
    density = np.cos(u) ** (degrees - 1)
    cumulative = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(np.sqrt(degrees) * np.tan(np.interp(confidence, cumulative / cumulative[-1], u)))
