"""What an objective is, what it is given, and what the policy loss returns.

An objective of one's own, in any importable module:

    MINE = Objective(
        name="mine",
        surrogate=lambda inputs: clipped_surrogate(inputs.ratios.token_log, inputs.token_advantages, inputs.clip_range),
        unit="token",
        clip_low=0.1,
        clip_high=0.1,
    )

and `objective.name: my_package.my_module:MINE` in the recipe.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_gspo.policy_loss.ratio import ImportanceRatios
from megatron_gspo.policy_loss.trust_region import ClipRange, Surrogate


class WideClipRangeWarning(UserWarning):
    """A clip range so wide that the objective's importance ratio hardly ever reaches it."""


@dataclass(frozen=True)
class ObjectiveInputs:
    """What a surrogate is computed from. Everything but `ratios` is constant."""

    ratios: ImportanceRatios
    advantages: torch.Tensor  # [N] one a response; or [T] one a token, for objectives that take those
    clip_range: ClipRange

    @property
    def token_advantages(self) -> torch.Tensor:
        """[T]; the advantage of a response is that of each of its tokens."""
        segments = self.ratios.segments
        return segments.expand(self.advantages) if len(self.advantages) == segments.num_responses else self.advantages


@dataclass(frozen=True)
class Objective:
    """A ratio and a trust region, with the clip range that suits them."""

    name: str
    surrogate: Callable[[ObjectiveInputs], Surrogate]
    unit: Literal["response", "token"]  # what the surrogate has one entry for, and so what is clipped as a whole
    clip_low: float  # default ε_low
    clip_high: float  # default ε_high
    takes_token_advantages: bool = True
    ratio_unit: Literal["response", "token"] | None = None  # what has an importance ratio of its own; None for `unit`
    widest_clip: float | None = None  # a range above this is warned about; None for any

    def clip_range(self, low: float | None = None, high: float | None = None, dual: float | None = None) -> ClipRange:
        """The clip range to use; None takes the objective's own.

        Raises:
            UserError: a range that is none, naming the recipe's field.

        Warns:
            WideClipRangeWarning: a range wider than `widest_clip`.
        """
        chosen = ClipRange(
            low=self.clip_low if low is None else low, high=self.clip_high if high is None else high, dual=dual
        )
        if self.widest_clip is not None and max(chosen.low, chosen.high) > self.widest_clip:
            warnings.warn(
                f"objective.clip_low {chosen.low} and objective.clip_high {chosen.high} are too wide for {self.name}: its "
                f"importance ratio is averaged over a response's tokens and seldom moves {self.widest_clip} away from 1, "
                f"so next to nothing will be clipped. The paper clips at {self.clip_low} and {self.clip_high}; ranges "
                "like 0.2 belong to token-level ratios (grpo).",
                WideClipRangeWarning,
                stacklevel=3,
            )
        return chosen


@dataclass(frozen=True)
class PolicyLossOutput:
    """A call's part of the mini-batch's loss, and what was seen on the way. All but `loss` is detached."""

    loss: torch.Tensor  # 0-d, to be minimised; over a mini-batch's micro-batches and ranks it sums to the mini-batch's
    metrics: Mapping[str, tuple[torch.Tensor, float]]  # name -> (sum, 0-d; count); both add up
    maxima: Mapping[str, torch.Tensor]  # name -> 0-d; combined by taking the largest
