"""Which tokens of a packed micro-batch a context-parallel rank holds: the balanced (zig-zag) cut that Megatron expects.

In: the bounds of a micro-batch's segments, each a multiple of 2·C tokens long. Out: positions in the packed micro-batch.

Every segment is cut into 2·C chunks of equal length, and rank r of C holds chunk r and chunk 2·C - 1 - r: one early and
one late, so that under the causal mask all ranks have the same work. Megatron-Core 0.16.1 (rope_utils.py) gives a rank's
tokens the positions of this cut, and Transformer Engine's attention expects it.

Shape legend: S packed tokens, C context-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ContextShare:
    """One rank's part of every micro-batch: rank `rank` of `size`."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size, "context-parallel ranks are counted from 0"

    @property
    def chunks(self) -> tuple[int, int]:
        """Which of a segment's 2·C chunks are here, the early one first."""
        return self.rank, 2 * self.size - 1 - self.rank

    def positions(self, segment_cu_seqlens: Tensor, num_tokens: int) -> Tensor:
        """Where the tokens held here are in the packed micro-batch, in the order they are held: [S / C] int64.

        Args:
            segment_cu_seqlens: [segments + 1] int32 or int64.
            num_tokens: S, the last of those, which need not be waited for.
        """
        if self.size == 1:
            return torch.arange(num_tokens, device=segment_cu_seqlens.device)
        starts, chunk = chunk_starts_and_length(segment_cu_seqlens, self.size)
        first = torch.stack([starts + index * chunk for index in self.chunks], dim=1).flatten()
        return ranges(first, chunk.repeat_interleave(2), num_tokens // self.size)


def chunk_starts_and_length(segment_cu_seqlens: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Each segment's first position, and the tokens in one of its 2·C chunks: [segments] int64 both."""
    bounds = segment_cu_seqlens.long()
    return bounds[:-1], bounds.diff() // (2 * size)


def ranges(first: Tensor, counts: Tensor, total: int) -> Tensor:
    """first, first + 1, … for `count` entries, for every `first` in turn: [total] int64, the sum of `counts`."""
    before = counts.cumsum(0) - counts
    return torch.arange(total, device=first.device) + (first - before).repeat_interleave(counts, output_size=total)


def pad_multiples(tensor: int, context: int) -> tuple[int, int]:
    """Tokens that a segment, and that a whole micro-batch, must be a multiple of.

    A segment is cut into 2·C chunks where there is more than one context-parallel rank, and what a rank holds into equal
    parts for sequence parallelism, one a tensor-parallel rank.
    """
    segment = 2 * context if context > 1 else 1
    return segment, segment * tensor
