"""GRPO, group relative policy optimization (eqs. 2 and 3): each token has its own ratio and is clipped by itself.

The gradient (eq. 13) weights a token by w_{i,t} A_i / |y_i|. The clip range is the one the paper tuned for its baseline.
"""

from __future__ import annotations

from megatron_gspo.policy_loss.base import Objective, ObjectiveInputs
from megatron_gspo.policy_loss.trust_region import Surrogate, clipped_surrogate


def grpo_surrogate(inputs: ObjectiveInputs) -> Surrogate:
    """min(w_{i,t} A_{i,t}, clip(w_{i,t}) A_{i,t}), [T]."""
    return clipped_surrogate(inputs.ratios.token_log, inputs.token_advantages, inputs.clip_range)


GRPO = Objective(name="grpo", surrogate=grpo_surrogate, unit="token", clip_low=0.2, clip_high=0.27)
