"""Means with intervals, against numbers worked out by hand."""

import numpy as np
import pytest

from tools.reproduce.intervals import mean_of, ratio_of_means, slope


def test_the_bootstrap_interval_of_a_mean_is_the_normal_one_for_many_values():
    values = np.random.default_rng(1).normal(0.3, 0.1, size=400)
    estimate = mean_of(values)
    half = 1.96 * values.std() / np.sqrt(400)
    assert estimate.value == pytest.approx(values.mean())
    assert (estimate.low, estimate.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=5e-4)


def test_for_few_values_students_interval_is_the_wider_one_and_a_rule_asks_both():
    estimate = mean_of([0.02, 0.05, 0.01, 0.09, 0.03])
    assert estimate.student_low is not None
    assert estimate.student_low < estimate.low
    between = (estimate.student_low + estimate.low) / 2
    assert not estimate.surely_above(between)
    assert estimate.surely_above(estimate.student_low - 1e-9)


def test_a_ratio_of_means_weighs_replicates_by_their_denominators():
    estimate = ratio_of_means([1.0, 30.0], [1.0, 10.0])
    assert estimate is not None
    assert estimate.value == pytest.approx(31 / 11)
    assert (estimate.low, estimate.high) == pytest.approx((1.0, 3.0))
    assert ratio_of_means([1.0], [0.0]) is None


def test_a_slope_over_groups_is_exact_where_the_groups_are_on_a_line():
    estimate = slope([(1.0, [2.0, 2.0]), (2.0, [5.0, 5.0]), (3.0, [8.0, 8.0])])
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((3.0, 3.0, 3.0))
    noisy = slope([(1.0, [0.0, 4.0]), (2.0, [5.0]), (3.0, [8.0])])
    assert noisy.value == pytest.approx(3.0)
    assert (noisy.low, noisy.high) == pytest.approx((2.0, 4.0))
