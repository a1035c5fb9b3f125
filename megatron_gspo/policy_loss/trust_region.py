"""The trust region: log-ratios and advantages in, the clipped surrogate and exactly what was clipped out.

    min(w A, clip(w, 1 - ε_low, 1 + ε_high) A)                                   (inside eqs. 2, 6 and 14)

bounds the ratio w from above where A > 0 and from below where A < 0, and leaves the other side free. Said that way, one
clamp with bounds chosen by the sign of A is the whole operator: what lies outside its bounds has gradient 0 and is
clipped, and nothing else is. A dual clip c bounds the free side of A < 0 as well: w ≤ c.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_gspo.types import UserError


@dataclass(frozen=True)
class ClipRange:
    """How far an importance ratio may move from 1 and still be learned from."""

    low: float  # ε_low in [0, 1]; 1 never clips from below
    high: float  # ε_high from 0; infinity never clips from above
    dual: float | None = None  # c > 1, the largest ratio where the advantage is negative; None for no limit

    def __post_init__(self) -> None:
        if not 0.0 <= self.low <= 1.0:
            raise UserError(f"objective.clip_low is {self.low}; it must be between 0 and 1 (at 1 nothing is clipped).")
        if not self.high >= 0.0:
            raise UserError(f"objective.clip_high is {self.high}; it must be 0 or more.")
        if self.dual is not None and not self.dual > 1.0:
            raise UserError(
                f"objective.dual_clip is {self.dual}; it must be above 1, because a lower cap takes the gradient of "
                "negative advantages from a policy that has hardly moved."
            )

    def log_bounds(self, advantages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Lower and upper bound of the log-ratio, each shaped like `advantages`. Where the advantage is 0, neither matters."""
        # Filled in the advantages' dtype: as plain numbers they would be rounded to float32 on the way.
        log_low = advantages.new_full((), math.log1p(-self.low) if self.low < 1.0 else -math.inf)
        log_high = advantages.new_full((), math.log1p(self.high))
        log_dual = advantages.new_full((), math.inf if self.dual is None else math.log(self.dual))
        return torch.where(advantages < 0, log_low, -math.inf), torch.where(advantages > 0, log_high, log_dual)


@dataclass(frozen=True)
class Surrogate:
    """What an objective makes of its log-ratios, one entry a response [N] or a token [T]."""

    values: torch.Tensor  # to be maximised; carries the gradient
    log_ratio: torch.Tensor  # before clipping, detached; exp of it is the importance weight
    clipped_low: torch.Tensor  # bool: the ratio fell below its bound, and with it went the gradient
    clipped_high: torch.Tensor  # bool: the ratio rose above its bound (1 + ε_high, or the dual clip)


def clipped_surrogate(log_ratio: torch.Tensor, advantages: torch.Tensor, clip_range: ClipRange) -> Surrogate:
    """Clip as PPO does, pessimistically and by the sign of the advantage.

    Args:
        log_ratio: [N] or [T] finite float; carries the gradient.
        advantages: the same shape and dtype, constant.

    A clipped entry is exponentiated only after the clamp, so it is finite however far the ratio ran away. What is not
    clipped is never capped in silence: with a negative advantage, no dual clip and a log-ratio above 88 (float32) the
    value is infinite, and the training loop's guard skips that update. An advantage of 0 gives value and gradient 0 at
    any ratio and is never counted as clipped.
    """
    lower, upper = clip_range.log_bounds(advantages)
    # Where the advantage is 0 the ratio does not matter, and must not: 0 · exp(89) would be NaN.
    relevant = log_ratio.masked_fill(advantages == 0, 0.0)
    values = torch.exp(torch.clamp(relevant, lower, upper)) * advantages
    return Surrogate(values, log_ratio.detach(), clipped_low=relevant < lower, clipped_high=relevant > upper)
