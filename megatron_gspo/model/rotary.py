"""Rotary positions of packed tokens, for models without Transformer Engine.

In: every token's position in its own segment. Out: one table for the whole micro-batch, made once and used by all layers,
with which queries and keys are turned in place of Megatron's own embedding (rope_utils.py, 0.16.1): that one cuts the
tokens into their segments and puts a table together from as many slices, in every layer, for queries and keys each.

Shape legend: S packed tokens, A heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


@dataclass(frozen=True)
class RotaryTable:
    """The angles of all tokens of a micro-batch, [S, 1, D / 2] each, in the model's dtype."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, positions: Tensor, inverse_frequencies: Tensor, dtype: torch.dtype) -> RotaryTable:
        """From each token's position in its segment [S] int64 and θ^(-2i / D) [D / 2] float32, rounded to `dtype`."""
        angles = torch.outer(positions.to(inverse_frequencies.dtype), inverse_frequencies).unsqueeze(1)
        return cls(angles.cos().to(dtype), angles.sin().to(dtype))

    def rotate(self, heads: Tensor) -> Tensor:
        """Turn `heads` [S, A, D] by their tokens' angles; dimension i goes with i + D / 2, as in Qwen3."""
        rotated: Tensor = _Rotation.apply(heads, self.cos, self.sin)
        return rotated


class RotaryInAttention(RotaryEmbedding):
    """Takes the place of a model's `rotary_pos_emb` where the core attention rotates packed tokens."""

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, **options: Any) -> Tensor | None:
        """Megatron's table for padded input; of packed input None, which its attention takes as nothing to apply."""
        return None if packed_seq else super().forward(max_seq_len, offset, packed_seq, **options)


class _Rotation(torch.autograd.Function):
    """Autograd would keep both halves and their products; the gradient needs but the angles, with the sine's sign turned."""

    @staticmethod
    def forward(ctx: FunctionCtx, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(heads, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, -sin), None, None


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(a cos - b sin, b cos + a sin) of the halves a and b of [S, A, D]."""
    first, second = heads.chunk(2, dim=-1)
    rotated = torch.empty_like(heads, memory_format=torch.contiguous_format)
    to_first, to_second = rotated.chunk(2, dim=-1)
    torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=to_second).addcmul_(first, sin)
    return rotated
