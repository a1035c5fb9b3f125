"""Router margins: binning, and what the AUC says when margins foretell everything, nothing, or the opposite."""

import numpy as np
import pytest
import torch

from megatron_gspo.routing.margin import NUM_MARGIN_BINS, margin_auc, margin_bin_edges, margin_bins


def count(margin: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """[1, M, 2] of one layer, one token at a time."""
    tokens = torch.zeros(1, NUM_MARGIN_BINS, 2, dtype=torch.int64)
    for one_bin, one_changed in zip(margin_bins(margin).tolist(), changed.tolist(), strict=True):
        tokens[0, one_bin, int(one_changed)] += 1
    return tokens


def test_bins_agree_with_their_edges():
    margin = torch.cat([torch.logspace(-8, 2, 997), margin_bin_edges()])
    expected = np.searchsorted(margin_bin_edges().numpy(), margin.numpy(), side="right")
    assert len(margin_bin_edges()) == NUM_MARGIN_BINS - 1
    np.testing.assert_array_equal(margin_bins(margin), expected)


def test_no_margin_and_an_endless_one_fall_into_the_outer_bins():
    assert margin_bins(torch.tensor([0.0, 1e-30, 1e9, float("inf")])).tolist() == [
        0,
        0,
        NUM_MARGIN_BINS - 1,
        NUM_MARGIN_BINS - 1,
    ]


@pytest.mark.parametrize("margin", [-1e-3, float("nan")])
def test_an_impossible_margin_is_refused_by_place(margin):
    margins = torch.ones(4, 3)
    margins[2, 1] = margin
    with pytest.raises(ValueError, match=r"\[2, 1\]"):
        margin_bins(margins)


def test_margins_that_foretell_every_change_have_auc_one():
    margin = torch.rand(500, generator=torch.Generator().manual_seed(0))
    changed = margin < 0.1
    far_apart = torch.where(changed, margin, margin + 1)
    assert margin_auc(count(far_apart, changed))[0].item() == 1
    assert margin_auc(count(far_apart, ~changed))[0].item() == 0


def test_margins_that_say_nothing_have_auc_one_half():
    generator = torch.Generator().manual_seed(1)
    margin, changed = torch.rand(20_000, generator=generator), torch.rand(20_000, generator=generator) < 0.2
    assert margin_auc(count(margin, changed))[0].item() == pytest.approx(0.5, abs=0.02)


def test_auc_is_the_share_of_pairs_in_order_counted_one_by_one():
    generator = torch.Generator().manual_seed(2)
    margin, changed = torch.rand(80, generator=generator) ** 4, torch.rand(80, generator=generator) < 0.4
    bins = margin_bins(margin).numpy()
    below = bins[changed.numpy()][:, None], bins[~changed.numpy()][None, :]
    expected = ((below[0] < below[1]) + 0.5 * (below[0] == below[1])).mean()
    auc, num_pairs = margin_auc(count(margin, changed))
    assert auc.item() == pytest.approx(expected)
    assert num_pairs.item() == below[0].size * below[1].size


def test_without_both_kinds_of_token_there_is_no_auc():
    tokens = count(torch.rand(9), torch.ones(9, dtype=torch.bool))
    auc, num_pairs = margin_auc(tokens)
    assert auc.isnan().all()
    assert num_pairs.item() == 0
