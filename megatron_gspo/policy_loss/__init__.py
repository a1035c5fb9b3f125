"""The policy loss: log-probs and advantages of packed responses in, a scalar to minimise and additive metrics out.

Pure tensor functions; nothing here needs CUDA, Megatron-Core or a process group. An objective is a choice of

    importance ratio (`ratio`)  ×  trust region (`trust_region`)  ×  aggregation (`aggregation`),

with the group's advantages (`advantages`, eq. 7), and optionally a weight for the engine that sampled
(`truncated_importance`) and a KL penalty (`kl`). `gspo`, `gspo_token` and
`grpo` are one file each; one's own is an `Objective` in any importable module, named `package.module:attribute`.
"""

from megatron_gspo.policy_loss.advantages import group_advantages, token_advantages
from megatron_gspo.policy_loss.base import Objective, ObjectiveInputs, PolicyLossOutput, WideClipRangeWarning
from megatron_gspo.policy_loss.finite import NonFiniteLogProbError
from megatron_gspo.policy_loss.loss import policy_loss
from megatron_gspo.policy_loss.metrics import finalize_metrics
from megatron_gspo.policy_loss.ratio import ImportanceRatios
from megatron_gspo.policy_loss.registry import OBJECTIVES, resolve_objective
from megatron_gspo.policy_loss.segments import Segments
from megatron_gspo.policy_loss.trust_region import ClipRange, Surrogate, clipped_surrogate

__all__ = [
    "OBJECTIVES",
    "ClipRange",
    "ImportanceRatios",
    "NonFiniteLogProbError",
    "Objective",
    "ObjectiveInputs",
    "PolicyLossOutput",
    "Segments",
    "Surrogate",
    "WideClipRangeWarning",
    "clipped_surrogate",
    "finalize_metrics",
    "group_advantages",
    "policy_loss",
    "resolve_objective",
    "token_advantages",
]
