"""How much of an importance ratio's variance is routing? (§5.3)

The same tokens are forwarded under the new policy twice, with its own routes and with the old policy's replayed:

    log w (natural) = log w (replayed) + routing part,

where the routing part is what following other experts alone did to the ratio. In: both log-ratios, one each a token; or
one each a response, averaged over its tokens (`ratio_coupling.response_means`: averaging keeps the sum above true). Out:
sums that add up, and from them, for `unit` "token" or "sequence":

    ratio/{unit}_natural_log_std              std of log w (natural)
    ratio/{unit}_replayed_log_std             std of log w (replayed)
    ratio/{unit}_routing_log_std              std of the routing part
    ratio/{unit}_replayed_variance_share      Var(replayed) / Var(natural)
    ratio/{unit}_routing_variance_share       Var(routing part) / Var(natural)
    ratio/{unit}_routing_covariance_share     2 Cov(replayed, routing part) / Var(natural)

The three shares sum to 1. The first two are no fractions of a whole: where the parts offset each other the covariance is
negative, and either may exceed 1. With a covariance share near 0, the routing share says how much noise replay removes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_gspo.routing.additive import Additive
from megatron_gspo.routing.moments import covariance, standard_deviation


@dataclass(frozen=True, eq=False)
class RatioDecomposition(Additive):
    """Sums over tokens, or over responses; b is log w (replayed), r the routing part. float64."""

    sums: torch.Tensor  # [6]: number of units, Σ b, Σ r, Σ b², Σ r², Σ b r


def decompose_ratio(natural: torch.Tensor, replayed: torch.Tensor) -> RatioDecomposition:
    """Sum up log-ratios of the same units under natural and replayed routing: both [T], or both [N]; float, finite."""
    assert natural.shape == replayed.shape and natural.ndim == 1, "two log-ratios of the same units"
    b = replayed.detach().double()
    r = natural.detach().double() - b
    return RatioDecomposition(torch.stack([torch.ones_like(b).sum(), b.sum(), r.sum(), b @ b, r @ r, b @ r]))


def decomposition_metrics(decomposition: RatioDecomposition, unit: str) -> dict[str, float]:
    """The metrics named above. Over no unit there are none; where log w (natural) does not vary there are no shares."""
    count, sum_b, sum_r, sum_bb, sum_rr, sum_br = decomposition.sums.tolist()
    if count == 0:
        return {}
    natural_log_std = standard_deviation(count, sum_b + sum_r, sum_bb + sum_rr + 2 * sum_br)
    metrics = {
        f"ratio/{unit}_natural_log_std": natural_log_std,
        f"ratio/{unit}_replayed_log_std": standard_deviation(count, sum_b, sum_bb),
        f"ratio/{unit}_routing_log_std": standard_deviation(count, sum_r, sum_rr),
    }
    if natural_log_std > 0:
        variances = {
            "replayed_variance": covariance(count, sum_b, sum_b, sum_bb),
            "routing_variance": covariance(count, sum_r, sum_r, sum_rr),
            "routing_covariance": 2 * covariance(count, sum_b, sum_r, sum_br),
        }
        shares = {f"ratio/{unit}_{part}_share": variance / natural_log_std**2 for part, variance in variances.items()}
        metrics |= shares
    return metrics
