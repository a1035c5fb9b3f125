"""Importance ratios, kept as logarithms: the current policy's log-probs and the old policy's in, log-ratios out.

Logarithms, because GSPO's clip range of 3e-4 is 2,500 float32 steps of a ratio near 1 but millions of steps of a
log-ratio near 0, and because a log-ratio cannot overflow. Only the trust region exponentiates, after clipping.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_gspo.policy_loss.finite import abs_max
from megatron_gspo.policy_loss.segments import Segments


@dataclass(frozen=True)
class ImportanceRatios:
    """Log importance ratios of packed responses, each computed when first asked for."""

    log_probs: torch.Tensor  # [T] float32 or float64, carries the gradient
    old_log_probs: torch.Tensor  # [T] the same dtype, constant
    segments: Segments

    @cached_property
    def token_log(self) -> torch.Tensor:
        """log w_{i,t} (eq. 3), [T]: each token's own ratio."""
        return self.log_probs - self.old_log_probs

    @cached_property
    def token_abs_log_max(self) -> torch.Tensor:
        """Largest |log w_{i,t}|, 0-d, detached; not finite where a log-prob is not."""
        return abs_max(self.token_log)

    @cached_property
    def sequence_sum(self) -> torch.Tensor:
        """log of a response's likelihood ratio, [N]: the sum of its token log-ratios."""
        return self.segments.sum(self.token_log)

    @cached_property
    def sequence_log(self) -> torch.Tensor:
        """log s_i (eq. 8), [N]: the mean of the token log-ratios, so a response's ratio does not grow with its length."""
        return self.sequence_sum / self.segments.divisors

    @cached_property
    def sequence_log_at_tokens(self) -> torch.Tensor:
        """log s_{i,t} (eq. 15), [T]: the value of log s_i at every token, the gradient of that token's log-prob alone."""
        return self.segments.expand(self.sequence_log) + (self.log_probs - self.log_probs.detach())
