"""Intervals and smoothing against numbers known from elsewhere."""

import numpy as np
import pytest

from megatron_gspo.report.statistics import (
    bootstrap_band,
    mean_interval,
    noise_std,
    student_t_quantile,
    trailing_mean,
)


# Any table of Student's t, two-sided 95%.
@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (29, 2.0452)])
def test_students_quantiles_are_those_of_the_tables(degrees, quantile):
    assert student_t_quantile(degrees) == pytest.approx(quantile, rel=1e-4)


def test_the_interval_of_a_mean_is_students():
    interval = mean_interval(np.array([1.0, 2.0, 3.0]))
    half = 4.3027 * 1.0 / np.sqrt(3)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((2.0, 2.0 - half, 2.0 + half), rel=1e-4)
    assert not interval.excludes_zero
    assert mean_interval(np.array([1.0, 1.1, 1.2])).excludes_zero


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0]])
def test_a_single_value_or_equal_ones_have_no_interval(values):
    interval = mean_interval(np.array(values))
    assert (interval.low, interval.high) == (None, None)
    assert not interval.excludes_zero


def test_a_students_interval_holds_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(1.0, 2.0, (2000, 4))
    covered = [interval.low <= 1.0 <= interval.high for interval in map(mean_interval, draws)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def test_the_bootstrap_band_is_seeded_lies_within_the_curves_and_needs_two():
    curves = np.random.default_rng(1).normal(size=(5, 30))
    low, high = bootstrap_band(curves)
    assert np.array_equal(low, bootstrap_band(curves)[0])
    assert (curves.min(0) <= low).all()
    assert (low <= curves.mean(0)).all()
    assert (curves.mean(0) <= high).all()
    assert (high <= curves.max(0)).all()
    assert bootstrap_band(curves[:1]) is None


def test_a_trailing_mean_never_looks_ahead():
    assert trailing_mean(np.array([1.0, 2.0, 3.0, 10.0]), 2).tolist() == [1.0, 1.5, 2.5, 6.5]


def test_noise_is_told_from_a_trend():
    noise = np.random.default_rng(2).normal(0, 0.1, 5000)
    assert noise_std(noise + np.linspace(0, 5, 5000)) == pytest.approx(0.1, rel=0.05)
