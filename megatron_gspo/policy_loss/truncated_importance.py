"""Truncated importance sampling: what a rollout engine sampled, weighted as if the trainer's old policy had.

The engine computes the same policy with other kernels, and in other precision perhaps, so responses come from a
behaviour policy π_engine that is not the π_old which importance ratios are taken against. Each term of the objective is
multiplied by the constant

    min(π_old / π_engine, C)          π_old recomputed by the trainer, π_engine as the engine sampled

(Yao et al., 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"; verl's `rollout_is_threshold`
and slime's `tis_clip` are this C). The trust region keeps its own ratio π_θ / π_old: what the engine rounds differently
is corrected for, and never counted as a step of the policy. So both likelihoods of the old policy are needed. Where the
engine's own are taken for π_old (`rollout.old_log_probs: engine`), that factor is 1 and the mismatch lies in π_θ / π_engine
itself.

In: both log-probs of each token. Out: a weight a token where the objective has token ratios (eq. 3), else one a response,
length-normalised as s_i is (eq. 8): a weight a token would undo what GSPO is for, all tokens of a response alike (eq. 11).
The cap bounds weights from above only, because only those can blow a gradient up. Tokens that earlier weights sampled
(`Response.earlier`) are corrected for those as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_gspo.policy_loss.segments import Segments
from megatron_gspo.types import UserError


@dataclass(frozen=True)
class TruncatedImportance:
    """Constant weights of the surrogate's terms."""

    segments: Segments
    weights: torch.Tensor  # [T] or, one a response, [N]; above 0, at most the cap
    truncated: torch.Tensor  # bool, the same shape: the weight was above the cap
    unit: Literal["response", "token"]

    def of(self, unit: Literal["response", "token"]) -> torch.Tensor:
        """The weights for a surrogate with one entry a `unit`."""
        return self._spread(self.weights) if unit == "token" else self._one_a_response()

    def of_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Each token's weight, and whether it was truncated, both [T]."""
        return self._spread(self.weights), self._spread(self.truncated)

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        return values if self.unit == "token" else self.segments.expand(values)

    def _one_a_response(self) -> torch.Tensor:
        assert self.unit == "response", "a surrogate with one entry a response has one ratio a response"
        return self.weights


def truncated_importance(
    old_log_probs: torch.Tensor,
    behaviour_log_probs: torch.Tensor,
    segments: Segments,
    unit: Literal["response", "token"],
    cap: float,
) -> TruncatedImportance:
    """min(π_old / π_engine, cap) of each token, or of each response by the mean of its tokens' logarithms.

    Args:
        old_log_probs: [T] finite float, log π_old from the trainer.
        behaviour_log_probs: [T] the same dtype, log π_engine of the same tokens.
        unit: what has one weight.
        cap: C, at least 1: a lower one would weigh down what both agree on.

    Raises:
        UserError: a cap below 1.
    """
    if not cap >= 1.0:
        raise UserError(f"objective.truncated_importance_cap is {cap}; it must be 1 or more, or null for none.")
    log_weights = (old_log_probs - behaviour_log_probs).detach()
    if unit == "response":
        log_weights = segments.mean(log_weights)
    truncated = log_weights > math.log(cap)
    # The cap itself where it is reached: exp(log(cap)) would be off in the last bit.
    weights = log_weights.clamp(max=math.log(cap)).exp().masked_fill(truncated, cap)
    return TruncatedImportance(segments, weights, truncated, unit)
