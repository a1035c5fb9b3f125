"""GSPO-token (eqs. 14 and 15): GSPO's ratio at every token, so that each token may have an advantage of its own.

With equal advantages in a response it is GSPO: the same value, the same clipped responses, the same gradient (eq. 17).
"""

from __future__ import annotations

from megatron_gspo.policy_loss.base import Objective, ObjectiveInputs
from megatron_gspo.policy_loss.gspo import PAPER_CLIP_HIGH, PAPER_CLIP_LOW, WIDEST_SEQUENCE_CLIP
from megatron_gspo.policy_loss.trust_region import Surrogate, clipped_surrogate


def gspo_token_surrogate(inputs: ObjectiveInputs) -> Surrogate:
    """min(s_{i,t} A_{i,t}, clip(s_{i,t}) A_{i,t}), [T]."""
    return clipped_surrogate(inputs.ratios.sequence_log_at_tokens, inputs.token_advantages, inputs.clip_range)


GSPO_TOKEN = Objective(
    name="gspo_token",
    surrogate=gspo_token_surrogate,
    unit="token",
    clip_low=PAPER_CLIP_LOW,
    clip_high=PAPER_CLIP_HIGH,
    ratio_unit="response",
    widest_clip=WIDEST_SEQUENCE_CLIP,
)
