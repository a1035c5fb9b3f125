"""What routing change does to the ratios: against NumPy on all the data at once, and where the answer is known."""

from functools import reduce
from itertools import pairwise
from operator import add

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gspo.routing.ratio_coupling import couple_change_to_ratio, coupling_metrics, response_means

T = 300


def token_data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-ratios (float32, as the trainer has them) that are seven times as wide where routes changed."""
    generator = torch.Generator().manual_seed(seed)
    rates = (torch.rand(T, generator=generator) - 0.5).clamp(min=0)
    return torch.randn(T, generator=generator) * 0.002 * (1 + 6 * (rates > 0)), rates


def test_metrics_are_numpys():
    log_ratio, rates = token_data()
    x, c = log_ratio.double().numpy(), rates.double().numpy()
    expected = {
        "ratio/token_log_std_changed": x[c > 0].std(),
        "ratio/token_log_std_unchanged": x[c == 0].std(),
        "ratio/token_abs_log_mean_changed": np.abs(x[c > 0]).mean(),
        "ratio/token_abs_log_mean_unchanged": np.abs(x[c == 0]).mean(),
        "ratio/token_change_correlation": np.corrcoef(c, np.abs(x))[0, 1],
    }
    metrics = coupling_metrics(couple_change_to_ratio(log_ratio, rates), "token")
    assert metrics == pytest.approx(expected, rel=1e-10)
    assert metrics["ratio/token_log_std_changed"] > 5 * metrics["ratio/token_log_std_unchanged"]


@settings(max_examples=30)
@given(st.lists(st.integers(0, T), max_size=4))
def test_micro_batches_add_up_to_the_whole(cuts):
    log_ratio, rates = token_data()
    edges = [0, *sorted(cuts), T]
    parts = [couple_change_to_ratio(log_ratio[a:b], rates[a:b]) for a, b in pairwise(edges)]
    total = parts[0].from_vector(reduce(add, parts).to_vector())
    whole = couple_change_to_ratio(log_ratio, rates)
    assert coupling_metrics(total, "token") == pytest.approx(coupling_metrics(whole, "token"), rel=1e-10)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_ratio_in_proportion_to_change_correlates_fully(sign):
    rates = torch.linspace(0, 1, 11)
    magnitude = 0.5 + sign * 0.1 * rates
    alternating = magnitude * torch.tensor([1.0, -1.0] * 5 + [1.0])
    metrics = coupling_metrics(couple_change_to_ratio(alternating, rates), "token")
    assert metrics["ratio/token_change_correlation"] == pytest.approx(sign, abs=1e-6)


def test_change_unrelated_to_the_ratio_correlates_with_nothing():
    generator = torch.Generator().manual_seed(1)
    rates, log_ratio = torch.rand(50_000, generator=generator), torch.randn(50_000, generator=generator)
    correlation = coupling_metrics(couple_change_to_ratio(log_ratio, rates), "token")["ratio/token_change_correlation"]
    assert correlation == pytest.approx(0, abs=0.02)


def test_a_constant_correlates_with_nothing_and_what_was_not_measured_is_absent():
    log_ratio, _ = token_data()
    unchanged = coupling_metrics(couple_change_to_ratio(log_ratio, torch.zeros(T)), "token")
    assert set(unchanged) == {"ratio/token_log_std_unchanged", "ratio/token_abs_log_mean_unchanged"}
    # Rounding leaves some of these constants a variance above 0.
    for rate in torch.rand(300, generator=torch.Generator().manual_seed(2), dtype=torch.float64):
        always = coupling_metrics(couple_change_to_ratio(log_ratio, rate.expand(T)), "sequence")
        assert set(always) == {"ratio/sequence_log_std_changed", "ratio/sequence_abs_log_mean_changed"}
    assert coupling_metrics(couple_change_to_ratio(torch.zeros(0), torch.zeros(0)), "token") == {}


def test_ratios_that_are_all_one_have_a_spread_of_exactly_zero():
    metrics = coupling_metrics(couple_change_to_ratio(torch.zeros(T), token_data()[1]), "token")
    assert metrics["ratio/token_log_std_changed"] == metrics["ratio/token_log_std_unchanged"] == 0
    assert "ratio/token_change_correlation" not in metrics


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_response_means_are_of_each_response_that_has_tokens(dtype):
    values = torch.tensor([1.0, 2.0, 3.0, 10.0, 0.0, 4.0])
    means = response_means(values, torch.tensor([0, 3, 3, 4, 6], dtype=dtype))
    assert means.tolist() == [2.0, 10.0, 2.0]
    assert response_means(torch.zeros(0), torch.tensor([0, 0], dtype=dtype)).tolist() == []


def test_sequence_ratios_average_away_noise_that_tokens_show():
    """Ratios that differ token by token in responses that do not differ: the claim of §5.3 at its extreme."""
    log_ratio = torch.tensor([0.5, -0.5] * 60)
    rates = torch.tensor([0.2, 0.1] * 60)
    cu_seqlens = torch.tensor([0, 20, 60, 120])
    tokens = coupling_metrics(couple_change_to_ratio(log_ratio, rates), "token")
    sequences = coupling_metrics(
        couple_change_to_ratio(response_means(log_ratio, cu_seqlens), response_means(rates, cu_seqlens)), "sequence"
    )
    assert tokens["ratio/token_log_std_changed"] == 0.5
    assert sequences["ratio/sequence_log_std_changed"] == 0
