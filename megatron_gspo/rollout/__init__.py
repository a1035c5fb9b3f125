"""Rollouts: from prompts and the policy's weights to sampled responses.

`engine.RolloutEngine` says what the training loop may ask of any engine; `local.LocalEngine` is the one that lives in the
trainer's process.
"""

from megatron_gspo.rollout.engine import RolloutEngine

__all__ = ["RolloutEngine"]
