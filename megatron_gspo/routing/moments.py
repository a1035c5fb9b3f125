"""Variances, covariances and correlations from sums, which add up where the values themselves are far apart.

Population statistics throughout. Log-ratios lie around 0, so a variance from float64 sums loses nothing worth having.
"""

from __future__ import annotations

import math

ROUND_OFF = 1e-12  # of float64 sums over millions of values: a variance below this share of the mean square is none


def covariance(count: float, sum_x: float, sum_y: float, sum_xy: float) -> float:
    """Mean of xy minus the product of the means."""
    return sum_xy / count - (sum_x / count) * (sum_y / count)


def standard_deviation(count: float, sum_x: float, sum_xx: float) -> float:
    """Spread of x about its mean; exactly 0 for values that are all the same."""
    return math.sqrt(_variance(count, sum_x, sum_xx))


def correlation(count: float, sum_x: float, sum_y: float, sum_xx: float, sum_yy: float, sum_xy: float) -> float | None:
    """Pearson's r, in [-1, 1]; None where x or y does not vary."""
    product = _variance(count, sum_x, sum_xx) * _variance(count, sum_y, sum_yy)
    if product == 0:
        return None
    return max(-1.0, min(1.0, covariance(count, sum_x, sum_y, sum_xy) / math.sqrt(product)))


def _variance(count: float, sum_x: float, sum_xx: float) -> float:
    variance = covariance(count, sum_x, sum_x, sum_xx)
    return variance if variance > ROUND_OFF * sum_xx / count else 0.0
