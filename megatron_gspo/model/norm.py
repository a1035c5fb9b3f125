"""RMSNorm for models without Transformer Engine.

Megatron's own wrapper of PyTorch's norms (transformer/torch_norm.py, 0.16.1) refuses sequence parallelism, which MoE
models need for training under tensor parallelism. PyTorch's norm is one kernel on a GPU; on a CPU it is a chain of
operations, each of which autograd differentiates by itself, so there both passes are written out below.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

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
        if x.device.type == "cpu" and x.dtype == self.weight.dtype and x.dtype != torch.bfloat16:
            return rms_norm_on_cpu(x, self.weight, self.eps)
        return nn.functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rms_norm_on_cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + ε) · weight over the last dimension, in few passes over memory.

    Args:
        x: [..., H] float32 or float64.
        weight: [H], of the same dtype.
    """
    normalized: Tensor = _RMSNorm.apply(x, weight, eps)
    return normalized


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / √(mean(x²) + ε): y = x r w, ∂x = r (g w) - x r³ mean(g w x), ∂w = Σ g x r over rows."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = (x * x).mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        size = x.shape[-1]
        products = (gradient * x).reshape(-1, size)
        grad_weight = scale.reshape(-1) @ products
        shrinkage = (products @ weight).view_as(scale).mul_(scale.pow(3)).div_(-size)
        return (gradient * weight).mul_(scale).addcmul_(x, shrinkage), grad_weight, None
