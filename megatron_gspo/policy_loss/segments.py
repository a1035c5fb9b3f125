"""Packed responses: which tokens belong to which response, and sums, means and broadcasts along that.

Shape legend of this package: T response tokens in the call, N responses. Response i owns tokens
`cu_seqlens[i]:cu_seqlens[i + 1]`; there is no padding anywhere, so none can leak into a mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
import torch
from torch.autograd.function import FunctionCtx, once_differentiable


@dataclass(frozen=True)
class Segments:
    """The N responses that T packed tokens belong to. A response without tokens is allowed and has sum and mean 0."""

    cu_seqlens: torch.Tensor  # [N + 1] int32 or int64, from 0 to T, never falling
    num_tokens: int  # T, known on the host so that nothing here waits for the device

    @property
    def num_responses(self) -> int:
        """N."""
        return len(self.cu_seqlens) - 1

    @cached_property
    def lengths(self) -> torch.Tensor:
        """[N] int64, tokens of each response."""
        return self.cu_seqlens.diff().long()

    @cached_property
    def divisors(self) -> torch.Tensor:
        """[N] int64, what turns a response's sum into its mean: its length, or 1 where it has no tokens."""
        return self.lengths.clamp(min=1)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum `values` [T] over each response: [N], differentiable once, and deterministic on every device.

        (`index_add_` would add in whatever order a GPU's threads arrive, and a run would not repeat bit for bit.)
        """
        return cast(torch.Tensor, _SegmentSum.apply(values, self))

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Average `values` [T] over each response: [N], differentiable once."""
        return self.sum(values) / self.divisors

    def expand(self, values: torch.Tensor) -> torch.Tensor:
        """Give every token its response's value: [N] to [T], as a constant (no gradient flows back)."""
        values = values.detach()
        if values.device.type == "cpu":  # torch's repeats an index and looks every token up: nine times the time
            return torch.from_numpy(np.repeat(values.numpy(), self.lengths.numpy()))
        return torch.repeat_interleave(values, self.lengths, output_size=self.num_tokens)

    def locate(self, token: int) -> tuple[int, int]:
        """The response that packed token `token` belongs to, and its position there, both from 0. Waits for the device."""
        response = int(torch.searchsorted(self.cu_seqlens, token, right=True)) - 1
        return response, token - int(self.cu_seqlens[response])


class _SegmentSum(torch.autograd.Function):
    """A response's sum; every token's gradient is its response's."""

    segments: Segments

    @staticmethod
    def forward(ctx: FunctionCtx, values: torch.Tensor, segments: Segments) -> torch.Tensor:
        ctx.segments = segments  # type: ignore[attr-defined]
        if values.device.type == "cpu":
            return _sums_on_cpu(values, segments)
        return torch.segment_reduce(values, "sum", offsets=segments.cu_seqlens, axis=0, initial=0)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.segments.expand(grad), None  # type: ignore[attr-defined]


def _sums_on_cpu(values: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Sums by NumPy, which adds pairwise and in vectors; `torch.segment_reduce` takes a token at a time there."""
    sums = values.new_zeros(segments.num_responses)
    if segments.num_tokens:
        # `reduceat` sums from each start to the next, so a response without tokens must not be one of them.
        has_tokens = (segments.lengths > 0).numpy()
        starts = segments.cu_seqlens[:-1].numpy()[has_tokens]
        sums.numpy()[has_tokens] = np.add.reduceat(values.detach().numpy(), starts)
    return sums
