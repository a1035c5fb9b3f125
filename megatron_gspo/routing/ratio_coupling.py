"""Are the importance ratios of rerouted tokens noisier? (§5.3: routing change makes w_{i,t} fluctuate, and s_i not.)

In: log-ratios and change rates, one each a token, log w_{i,t} with its c averaged over all MoE layers of the model; or
one each a response, both averaged over its tokens (`response_means`), where the mean of log w_{i,t} is log s_i (eq. 8).
Out: sums that add up, and from them, for `unit` "token" or "sequence" with x its log-ratio and c its change rate:

    ratio/{unit}_log_std_changed           std of x over units with c > 0
    ratio/{unit}_log_std_unchanged         std of x over units with c = 0
    ratio/{unit}_abs_log_mean_changed      mean of |x| over units with c > 0
    ratio/{unit}_abs_log_mean_unchanged    mean of |x| over units with c = 0
    ratio/{unit}_change_correlation        Pearson correlation of c and |x| over all units

Averaging n independent token log-ratios shrinks their spread by √n by itself: compare sequences with that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_gspo.routing.additive import Additive
from megatron_gspo.routing.moments import correlation, standard_deviation


@dataclass(frozen=True, eq=False)
class RatioCoupling(Additive):
    """Sums over tokens, or over responses. float64."""

    by_change: torch.Tensor  # [2, 4] for units with c = 0 and with c > 0: their number, Σ x, Σ x², Σ |x|
    cross: torch.Tensor  # [3] over all units: Σ c, Σ c², Σ c |x|


def couple_change_to_ratio(log_ratio: torch.Tensor, change_rate: torch.Tensor) -> RatioCoupling:
    """Sum up log-ratios by change: both [T], or both [N]; float, finite, 0 <= change_rate <= 1."""
    assert log_ratio.shape == change_rate.shape and log_ratio.ndim == 1, "one log-ratio and one change rate a unit"
    x, c = log_ratio.detach().double(), change_rate.double()
    changed = (c > 0).double()
    classes = torch.stack([1 - changed, changed])  # [2, units]
    powers = torch.stack([torch.ones_like(x), x, x * x, x.abs()], dim=1)  # [units, 4]
    return RatioCoupling(by_change=classes @ powers, cross=torch.stack([c.sum(), c @ c, c @ x.abs()]))


def response_means(values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Mean of `values` [T] over each response's tokens: [responses with tokens] float64.

    `cu_seqlens` [N + 1] int runs from 0 to T; response i owns tokens cu_seqlens[i]:cu_seqlens[i + 1], all of them, since
    s_i is of the whole response.
    """
    lengths = cu_seqlens.diff()
    sums = torch.segment_reduce(values.detach().double(), "sum", offsets=cu_seqlens, axis=0, initial=0)
    return sums[lengths > 0] / lengths[lengths > 0]


def coupling_metrics(coupling: RatioCoupling, unit: str) -> dict[str, float]:
    """The metrics named above. One that is over no unit, or a correlation with something constant, is absent."""
    metrics: dict[str, float] = {}
    by_change = coupling.by_change.tolist()
    for name, (count, total, squares, magnitudes) in zip(("unchanged", "changed"), by_change, strict=True):
        if count > 0:
            metrics[f"ratio/{unit}_log_std_{name}"] = standard_deviation(count, total, squares)
            metrics[f"ratio/{unit}_abs_log_mean_{name}"] = magnitudes / count
    count, _, squares, magnitudes = coupling.by_change.sum(0).tolist()
    sum_c, sum_cc, sum_c_magnitude = coupling.cross.tolist()
    if count > 0:
        together = correlation(count, sum_c, magnitudes, sum_cc, squares, sum_c_magnitude)
        if together is not None:
            metrics[f"ratio/{unit}_change_correlation"] = together
    return metrics
