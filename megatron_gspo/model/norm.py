"""RMSNorm for models without Transformer Engine.

Megatron's own wrapper of PyTorch's norms (transformer/torch_norm.py, 0.16.1) refuses sequence parallelism, which MoE
models need for training under tensor parallelism.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_gspo.platform import device


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) · weight over the last dimension, accumulated in float32."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device()))
        # Each tensor-parallel rank sees its part of the sequence (or, for queries and keys, of the heads), so Megatron
        # must sum this weight's gradient over them (distributed/finalize_model_grads.py).
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [..., hidden_size]; shape and dtype stay."""
        return nn.functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
