"""What is counted about changing routes: against Python sets, adding up, and as metrics and arrays."""

from functools import reduce
from itertools import pairwise
from operator import add

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gspo.routing.change import change_rate, count_replaced
from megatron_gspo.routing.volatility import RoutingChange, count_change, count_rerouted_tokens
from megatron_gspo.routing.volatility_metrics import (
    ENGINE_DISAGREEMENT,
    NOISE_FLOOR,
    ChangeNames,
    change_metrics,
    margin_metrics,
    summarize,
    to_arrays,
)
from tests.unit.routing.random_routes import lost_by_sets, random_routes

T, L, K, E = 40, 3, 4, 12
LAYERS = (2, 5, 9)


def partly_changed(num_tokens: int = T, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Routes [T, L, K] of which about a third have been drawn anew."""
    old, drawn = random_routes(num_tokens, L, K, E, seed), random_routes(num_tokens, L, K, E, seed + 1)
    redraw = torch.rand(num_tokens, L, generator=torch.Generator().manual_seed(seed)) < 0.3
    return old, torch.where(redraw[..., None], drawn, old)


def counted(old: torch.Tensor, new: torch.Tensor, positions: torch.Tensor | None = None, **options) -> RoutingChange:
    if positions is None:
        positions = torch.zeros(len(old))
    return count_change(
        old, new, num_experts=options.pop("num_experts", E), layers=LAYERS, positions=positions, **options
    )


def assert_same_counts(a: RoutingChange, b: RoutingChange) -> None:
    assert torch.equal(a.to_vector(), b.to_vector())
    assert (a.layers, a.top_k) == (b.layers, b.top_k)


def test_every_count_is_that_of_python_sets():
    old, new = partly_changed()
    positions = torch.rand(T, generator=torch.Generator().manual_seed(3))
    tokens = np.zeros((L, 16, K + 1), dtype=int)
    load_old, load_new, lost, gained = (np.zeros((L, E), dtype=int) for _ in range(4))
    losses, gains = lost_by_sets(old, new), lost_by_sets(new, old)
    for token in range(T):
        for layer in range(L):
            tokens[layer, int(positions[token] * 16), len(losses[token][layer])] += 1
            load_old[layer, old[token, layer].tolist()] += 1
            load_new[layer, new[token, layer].tolist()] += 1
            lost[layer, list(losses[token][layer])] += 1
            gained[layer, list(gains[token][layer])] += 1

    change = counted(old, new, positions)

    assert 0 < tokens[:, :, 1:].sum() < T * L, "the case has tokens that changed, and tokens that did not"
    np.testing.assert_array_equal(change.tokens, tokens)
    np.testing.assert_array_equal(change.load_old, load_old)
    np.testing.assert_array_equal(change.load_new, load_new)
    np.testing.assert_array_equal(change.lost, lost)
    np.testing.assert_array_equal(change.gained, gained)
    assert change.num_tokens.tolist() == [T] * L


def test_change_metrics_are_the_mean_of_c_over_tokens_and_layers():
    old, new = partly_changed()
    rates = change_rate(old, new).double()
    rerouted = count_rerouted_tokens(count_replaced(old, new).sum(1))
    metrics = change_metrics(counted(old, new), rerouted)
    assert metrics["routing/change_rate"] == pytest.approx(float(rates.mean()), rel=1e-12)
    assert metrics["routing/tokens_any_change"] == float((rates > 0).any(1).double().mean())
    for row, layer in enumerate(LAYERS):
        assert metrics[f"routing/change_rate_layer_{layer}"] == pytest.approx(float(rates[:, row].mean()), rel=1e-12)


def test_unchanged_routes_report_exactly_zero_and_disjoint_ones_exactly_one():
    old = random_routes(T, L, 4, 6, seed=4)
    for new, expected in ((old.flip(-1), 0.0), (old + 6, 1.0)):
        metrics = change_metrics(counted(old, new), count_rerouted_tokens(count_replaced(old, new).sum(1)))
        assert set(metrics.values()) == {expected}
        assert len(metrics) == 2 + L


def test_a_token_rerouted_on_one_pipeline_stage_only_counts_once():
    first_stage, second_stage = torch.tensor([0, 3, 0, 1]), torch.tensor([0, 0, 2, 5])
    rerouted = count_rerouted_tokens(first_stage + second_stage)
    assert (int(rerouted.num_rerouted), int(rerouted.num_tokens)) == (3, 4)


def test_change_is_counted_where_in_the_response_it_happens():
    old = random_routes(8, L, K, 6, seed=5)
    new = old.clone()
    new[6:] += 6  # the last quarter of one response of 8 tokens
    by_position = to_arrays(counted(old, new, torch.arange(8) / 8, num_position_bins=4))["change_rate_by_position"]
    np.testing.assert_array_equal(by_position, [[0, 0, 0, 1]] * L)


@settings(max_examples=40)
@given(st.lists(st.integers(0, T), max_size=4), st.booleans())
def test_parts_of_the_tokens_add_up_to_the_whole(cuts, through_vectors):
    old, new = partly_changed()
    generator = torch.Generator().manual_seed(6)
    positions, margin = torch.rand(T, generator=generator), torch.rand(T, L, generator=generator)
    whole = counted(old, new, positions, old_margin=margin)
    edges = [0, *sorted(cuts), T]
    parts = [counted(old[a:b], new[a:b], positions[a:b], old_margin=margin[a:b]) for a, b in pairwise(edges)]
    if through_vectors:  # as an all-reduce adds them
        total = whole.from_vector(torch.stack([part.to_vector() for part in parts]).sum(0))
    else:
        total = reduce(add, parts)
    assert_same_counts(total, whole)
    assert total.tokens.dtype == torch.int64


def test_pipeline_stages_add_up_on_the_layers_of_the_whole_model():
    old, new = partly_changed()
    whole = counted(old, new)
    stages = [
        count_change(
            old[:, rows],
            new[:, rows],
            num_experts=E,
            layers=[LAYERS[row] for row in rows],
            positions=torch.zeros(T),
        )
        for rows in ([2], [], [0, 1])  # one stage has dense layers only
    ]
    assert_same_counts(reduce(add, [stage.on_layers(LAYERS) for stage in stages]), whole)


def test_counts_of_other_layers_do_not_add():
    with pytest.raises(AssertionError, match="cannot add"):
        RoutingChange.zeros((0, 1), E, K) + RoutingChange.zeros((0, 2), E, K)


def test_counts_above_what_float32_holds_survive_the_vector():
    counts = RoutingChange.zeros(LAYERS, E, K)
    counts.load_new[1, 1] = 2**40 + 1
    assert counts.from_vector(counts.to_vector()).load_new[1, 1] == 2**40 + 1


def test_without_a_token_nothing_is_counted_and_no_metric_is_reported():
    nothing = random_routes(0, L, K, E, seed=0)
    change = counted(nothing, nothing.clone(), old_margin=torch.zeros(0, L))
    assert_same_counts(change, RoutingChange.zeros(LAYERS, E, K))
    assert summarize(change, count_rerouted_tokens(torch.zeros(0, dtype=torch.int32))) == {}
    assert np.isnan(to_arrays(change)["change_rate"]).all()


def test_a_layer_without_a_token_is_absent_and_does_not_dilute_the_others():
    old = random_routes(T, 1, 2, 6, seed=7)
    change = count_change(old, old + 6, num_experts=E, layers=[0], positions=torch.zeros(T)).on_layers([0, 1])
    assert change_metrics(change) == {"routing/change_rate": 1.0, "routing/change_rate_layer_0": 1.0}
    assert summarize(change)["routing/dead_experts"] <= 1 / 2


@pytest.mark.parametrize(("top_k", "num_experts"), [(1, 1), (6, 6), (2, 512)])
def test_edges_of_top_k_and_experts(top_k, num_experts):
    old = random_routes(T, L, top_k, num_experts, seed=8, dtype=torch.int64)
    new = random_routes(T, L, top_k, num_experts, seed=9, dtype=torch.int64)
    change = counted(old.to(torch.uint16), new.to(torch.uint16), num_experts=num_experts)
    assert torch.equal(change.load_new.sum(1), torch.full((L,), T * top_k))
    assert torch.equal(change.load_new[0], torch.bincount(new[:, 0].flatten(), minlength=num_experts))
    assert (change_metrics(change)["routing/change_rate"] == 0) == (top_k == num_experts)


def test_a_noise_floor_and_an_engines_disagreement_are_reported_under_their_own_names():
    old, new = partly_changed()
    rerouted = count_rerouted_tokens(count_replaced(old, new).sum(1))
    policy, noise, engine = (
        change_metrics(counted(old, new), rerouted, names)
        for names in (ChangeNames("a", "b"), NOISE_FLOOR, ENGINE_DISAGREEMENT)
    )
    assert noise["routing/noise_floor"] == engine["routing/engine_disagreement"] == policy["a"]
    assert engine["routing/engine_disagreement_tokens_any_layer"] == policy["b"]
    assert not policy.keys() & noise.keys() and not noise.keys() & engine.keys()


def test_a_margin_that_decides_every_change_is_found_and_one_of_another_layer_does_not_blur_it():
    old, new = partly_changed()
    changed = count_replaced(old, new) > 0
    # Scales of the layers differ by far more than changed and unchanged tokens within one.
    margin = torch.where(changed, 0.01, 0.02) * torch.tensor([1.0, 10.0, 100.0])
    assert margin_metrics(counted(old, new, old_margin=margin)) == {"routing/margin_auc": 1.0}
    assert margin_metrics(counted(old, new)) == {}


def test_margins_count_each_token_once_by_whether_it_changed():
    old, new = partly_changed()
    change = counted(old, new, old_margin=torch.rand(T, L))
    assert torch.equal(change.margin_tokens.sum(1)[:, 1], (count_replaced(old, new) > 0).sum(0))
    assert torch.equal(change.margin_tokens.sum((1, 2)), change.num_tokens)


def test_load_metrics_are_of_the_new_policy():
    old = torch.arange(E, dtype=torch.uint8).reshape(E, 1, 1).expand(E, L, 1).contiguous()
    summary = summarize(counted(old, torch.zeros_like(old)))
    assert summary["routing/dead_experts"] == pytest.approx((E - 1) / E)
    assert summary["routing/entropy"] == 0
    assert summary["routing/load_cv"] == pytest.approx((E - 1) ** 0.5)


def test_arrays_survive_a_file_and_hold_what_the_docstring_says(tmp_path):
    old, new = partly_changed()
    arrays = to_arrays(counted(old, new, old_margin=torch.rand(T, L)))
    np.savez_compressed(tmp_path / "step_1.npz", **arrays)
    with np.load(tmp_path / "step_1.npz", allow_pickle=False) as kept:
        assert set(kept) == set(arrays)
        for name in kept:
            np.testing.assert_array_equal(kept[name], arrays[name])
            assert f"\n    {name}" in to_arrays.__doc__ or f", {name} " in to_arrays.__doc__, f"{name} is documented"
    np.testing.assert_allclose(arrays["change_rate"], change_rate(old, new).double().mean(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": torch.full((T,), 1.0)}, "outside"),
        ({"positions": torch.full((T,), float("nan"))}, "outside"),
        ({"positions": torch.full((T,), 16)}, "outside"),
        ({"positions": torch.zeros(T - 1)}, "positions"),
        ({"layers": (0, 1)}, "3 MoE layers"),
        ({"old_margin": torch.zeros(T, L + 1)}, "margins"),
    ],
)
def test_arguments_that_do_not_fit_the_routes_are_refused(change, message):
    old, new = partly_changed()
    arguments = {"num_experts": E, "layers": LAYERS, "positions": torch.zeros(T)} | change
    with pytest.raises(ValueError, match=message):
        count_change(old, new, **arguments)


def test_positions_may_be_given_as_bins():
    old, new = partly_changed()
    positions = torch.rand(T, generator=torch.Generator().manual_seed(10))
    assert_same_counts(counted(old, new, positions), counted(old, new, (positions * 16).long()))
