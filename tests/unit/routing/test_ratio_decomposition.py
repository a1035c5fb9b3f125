"""The decomposition of a log-ratio into replayed and routing part: an identity, and cases with known shares."""

from functools import reduce
from itertools import pairwise
from operator import add

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gspo.routing.ratio_coupling import response_means
from megatron_gspo.routing.ratio_decomposition import decompose_ratio, decomposition_metrics

T = 400


def draw(seed: int, scale: float = 0.01) -> torch.Tensor:
    return torch.randn(T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


@settings(max_examples=40)
@given(st.floats(-2, 2), st.floats(1e-4, 3), st.integers(0, 100))
def test_the_three_shares_are_the_whole_variance(coupling, scale, seed):
    replayed = draw(seed)
    natural = replayed + coupling * replayed + draw(seed + 1, scale)
    metrics = decomposition_metrics(decompose_ratio(natural, replayed), "token")
    parts = ("replayed_variance", "routing_variance", "routing_covariance")
    shares = [metrics[f"ratio/token_{part}_share"] for part in parts]
    assert sum(shares) == pytest.approx(1, abs=1e-12 * max(1.0, *map(abs, shares)))


def test_metrics_are_numpys_for_tokens_and_for_sequences():
    replayed = draw(2)
    natural = replayed + draw(3, 0.03) - 0.4 * replayed
    cu_seqlens = torch.arange(0, T + 1, 20)
    units = {
        "token": (natural, replayed),
        "sequence": (response_means(natural, cu_seqlens), response_means(replayed, cu_seqlens)),
    }
    for unit, log_ratios in units.items():
        metrics = decomposition_metrics(decompose_ratio(*log_ratios), unit)
        a, b = (values.numpy() for values in log_ratios)
        covariances = np.cov(b, a - b, bias=True)
        expected = {
            "natural_log_std": a.std(),
            "replayed_log_std": b.std(),
            "routing_log_std": (a - b).std(),
            "replayed_variance_share": covariances[0, 0] / a.var(),
            "routing_variance_share": covariances[1, 1] / a.var(),
            "routing_covariance_share": 2 * covariances[0, 1] / a.var(),
        }
        assert metrics == pytest.approx({f"ratio/{unit}_{name}": value for name, value in expected.items()}, rel=1e-10)


def test_replay_that_changes_nothing_leaves_routing_no_share():
    log_ratio = draw(4)
    metrics = decomposition_metrics(decompose_ratio(log_ratio, log_ratio.clone()), "token")
    assert metrics["ratio/token_routing_variance_share"] == 0
    assert metrics["ratio/token_routing_covariance_share"] == 0
    assert metrics["ratio/token_replayed_variance_share"] == pytest.approx(1, rel=1e-12)


def test_ratios_that_replay_makes_one_are_all_routing():
    metrics = decomposition_metrics(decompose_ratio(draw(5), torch.zeros(T)), "token")
    assert metrics["ratio/token_routing_variance_share"] == pytest.approx(1, rel=1e-12)
    assert metrics["ratio/token_replayed_variance_share"] == metrics["ratio/token_routing_covariance_share"] == 0


def test_parts_that_offset_each_other_show_as_a_negative_covariance():
    replayed = draw(6)
    metrics = decomposition_metrics(decompose_ratio(replayed / 2, replayed), "token")
    shares = {name.removeprefix("ratio/token_"): value for name, value in metrics.items() if name.endswith("_share")}
    assert shares == pytest.approx(
        {"replayed_variance_share": 4, "routing_variance_share": 1, "routing_covariance_share": -4}, rel=1e-10
    )


@settings(max_examples=30)
@given(st.lists(st.integers(0, T), max_size=4))
def test_micro_batches_add_up_to_the_whole(cuts):
    replayed = draw(7)
    natural = replayed + draw(8)
    edges = [0, *sorted(cuts), T]
    parts = [decompose_ratio(natural[a:b], replayed[a:b]) for a, b in pairwise(edges)]
    total = decomposition_metrics(reduce(add, parts), "token")
    assert total == pytest.approx(decomposition_metrics(decompose_ratio(natural, replayed), "token"), rel=1e-10)


def test_no_token_has_no_metric_and_a_constant_ratio_no_shares():
    assert decomposition_metrics(decompose_ratio(torch.zeros(0), torch.zeros(0)), "token") == {}
    constant = decomposition_metrics(decompose_ratio(torch.zeros(T), draw(9)), "token")
    assert constant["ratio/token_natural_log_std"] == 0
    assert not [name for name in constant if name.endswith("_share")]
