"""KL penalty: the current and the reference policy's log-probs in, one estimate a token out.

With r = π_ref / π at the sampled token, the estimators of KL(π ‖ π_ref) are

    k1 = −log r            unbiased; but its gradient as a loss has mean 0, so it measures and does not penalise
    k2 = ½ (log r)²        biased; its gradient is that of KL(π ‖ π_ref)
    k3 = r − 1 − log r     unbiased, never negative; its gradient is that of KL(π_ref ‖ π)

(means over samples of the current policy). Tokens come from the old policy and are not reweighted here, as in GRPO.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from megatron_gspo.names import refuse_unknown_name

KLEstimator = Literal["k1", "k2", "k3"]


def kl_per_token(log_probs: torch.Tensor, reference_log_probs: torch.Tensor, estimator: KLEstimator) -> torch.Tensor:
    """Estimate KL(π ‖ π_ref) at each token: [T], differentiable in `log_probs`.

    k3 is infinite where the reference's log-prob is more than 88 (float32) above the policy's; it is not capped.

    Raises:
        UserError: an unknown estimator.
    """
    refuse_unknown_name("objective.kl_estimator", estimator, get_args(KLEstimator))
    log_r = reference_log_probs - log_probs
    if estimator == "k1":
        return -log_r
    if estimator == "k2":
        return 0.5 * log_r.square()
    return torch.expm1(log_r) - log_r
