"""GSPO, group sequence policy optimization (eqs. 6 and 8): one ratio, one clip and one advantage a response.

The gradient (eq. 11) weights all tokens of a response equally, by s_i A_i / |y_i|, and a clipped response gives none.
Everything but the mean of the token log-ratios is [N]-sized.
"""

from __future__ import annotations

from megatron_gspo.policy_loss.base import Objective, ObjectiveInputs
from megatron_gspo.policy_loss.trust_region import Surrogate, clipped_surrogate

PAPER_CLIP_LOW = 3e-4
PAPER_CLIP_HIGH = 4e-4
WIDEST_SEQUENCE_CLIP = 0.01
"""A length-normalised ratio seldom gets this far from 1; a wider range is one made for token ratios."""


def gspo_surrogate(inputs: ObjectiveInputs) -> Surrogate:
    """min(s_i A_i, clip(s_i) A_i), [N]."""
    return clipped_surrogate(inputs.ratios.sequence_log, inputs.advantages, inputs.clip_range)


GSPO = Objective(
    name="gspo",
    surrogate=gspo_surrogate,
    unit="response",
    clip_low=PAPER_CLIP_LOW,
    clip_high=PAPER_CLIP_HIGH,
    takes_token_advantages=False,
    widest_clip=WIDEST_SEQUENCE_CLIP,
)
