"""Does a close decision flip more easily? The old policy's router margin against what the new policy did.

The margin of a token in a layer is the K-th largest router score minus the K+1-th: how much a score has to move before
the set of experts changes. In: margins and whether the set changed. Out: tokens in bins of equal width in log10, and
from those the area under the ROC curve,

    AUC = P(margin of a changed token < margin of an unchanged token) + 1/2 P(both in the same bin),

pairs taken within a layer: 1 when small margins foretell every change, 1/2 when they say nothing.
"""

from __future__ import annotations

import torch

BINS_PER_DECADE = 8
SMALLEST_EXPONENT, LARGEST_EXPONENT = -7, 1  # float32 scores differ by 1e-7 or not at all; logits seldom by 10
NUM_MARGIN_BINS = (LARGEST_EXPONENT - SMALLEST_EXPONENT) * BINS_PER_DECADE


def margin_bin_edges() -> torch.Tensor:
    """The bounds between margin bins: [NUM_MARGIN_BINS - 1] float32. The first bin holds 0 too, the last is open."""
    steps = torch.arange(1, NUM_MARGIN_BINS, dtype=torch.float64)
    return (10.0 ** (SMALLEST_EXPONENT + steps / BINS_PER_DECADE)).float()


def margin_bins(margin: torch.Tensor) -> torch.Tensor:
    """The bin of each `margin` (any shape, float, 0 or more, infinity allowed): int32 of that shape.

    Raises:
        ValueError: a margin is negative or NaN.
    """
    if margin.numel() > 0 and not bool((margin >= 0).all()):
        first = (~(margin >= 0)).nonzero()[0]
        raise ValueError(
            f"the router margin at [token, layer] {first.tolist()} is {float(margin[tuple(first)])}; "
            "the K-th largest score minus the K+1-th is 0 or more"
        )
    edges = margin_bin_edges().to(margin.device)
    return torch.bucketize(margin.detach().float(), edges, right=True, out_int32=True)


def margin_auc(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """AUC of each layer, and how many (changed, unchanged) pairs it is over.

    `tokens` [L, NUM_MARGIN_BINS, 2] are counts of unchanged and of changed tokens in each bin. Returns [L] float64 twice;
    the AUC is NaN where there is no pair.
    """
    unchanged, changed = tokens.double().unbind(-1)
    num_pairs = unchanged.sum(-1) * changed.sum(-1)
    unchanged_above = unchanged.sum(-1, keepdim=True) - unchanged.cumsum(-1)
    ordered_pairs = (changed * (unchanged_above + unchanged / 2)).sum(-1)
    return ordered_pairs / num_pairs, num_pairs
