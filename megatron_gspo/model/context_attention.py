"""Causal attention over packed segments that are cut over context-parallel ranks, without Transformer Engine.

In: queries, keys and values of the tokens this rank holds (`context_parallel` says which). Out: what these tokens attend
to. Keys and values are gathered from all ranks, and backward each rank gets the sum of what all ranks' queries say of
its own; the queries stay. A chunk of queries sees its segment from the start to the chunk's end, so that every rank
compares equally many pairs.

Shape legend: S packed tokens, C context-parallel ranks, B batch, Q and K queries and keys of a chunk, A attention heads,
G key-value heads, D head size, N keys that this rank's chunks see, chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from megatron_gspo.context_parallel import ContextShare, chunk_starts_and_length, ranges
from megatron_gspo.types import MicroBatch


@dataclass(frozen=True)
class ChunkBatch:
    """Chunks of similar length as one padded batch, for a CPU."""

    queries: Tensor  # [B, Q] int64 into this rank's tokens; padding repeats the chunk's first
    keys: Tensor  # [B, K] int64 into the gathered keys; padding repeats the segment's first
    sees: Tensor  # [B, 1, Q, K] bool


@dataclass(frozen=True)
class ContextChunks:
    """How this rank's chunks of queries meet the gathered keys; made once a micro-batch, used by every layer."""

    keys: Tensor  # [N] int64 into the gathered keys
    query_cu_seqlens: Tensor  # [chunks + 1] int32
    key_cu_seqlens: Tensor  # [chunks + 1] int32
    max_query_tokens: int
    max_key_tokens: int
    batches: tuple[ChunkBatch, ...]  # on a CPU
    slots: Tensor | None  # on a CPU: [S / C] int64, where each of this rank's tokens is among the batches' slots

    @classmethod
    def of(cls, micro_batch: MicroBatch, share: ContextShare) -> ContextChunks:
        """Those of this rank's `share` of a micro-batch, whose segments are each a multiple of 2·C long."""
        segment_cu_seqlens, num_tokens = micro_batch.segment_cu_seqlens, len(micro_batch.token_ids)
        starts, chunk = chunk_starts_and_length(segment_cu_seqlens, share.size)
        chunks_seen = torch.tensor(share.chunks, device=chunk.device) + 1
        query_counts, key_counts = chunk.repeat_interleave(2), (chunk[:, None] * chunks_seen).flatten()
        # The two chunks see 2·C + 1 chunks together.
        seen = ranges(starts.repeat_interleave(2), key_counts, num_tokens + num_tokens // (2 * share.size))
        keys = _place_among_gathered(segment_cu_seqlens, num_tokens, share.size)[seen]
        batches: tuple[ChunkBatch, ...] = ()
        slots = None
        if not keys.is_cuda:
            batches, slots = _batched(keys, query_counts, key_counts)
        longest = micro_batch.max_segment_tokens // (2 * share.size)
        return cls(
            keys=keys,
            query_cu_seqlens=_bounds(query_counts).int(),
            key_cu_seqlens=_bounds(key_counts).int(),
            max_query_tokens=longest,
            max_key_tokens=longest * (share.chunks[1] + 1),
            batches=batches,
            slots=slots,
        )


def attend_across_ranks(
    query: Tensor, key: Tensor, value: Tensor, chunks: ContextChunks, group: dist.ProcessGroup, scale: float | None
) -> Tensor:
    """Attend causally from the tokens held here to those on all ranks of `group`.

    Args:
        query: [S / C, A, D].
        key, value: [S / C, G, D], G a divisor of A.

    Returns:
        [S / C, A, D].
    """
    # One collective for both. Its backward adds up what every rank's queries say of these keys and values.
    gathered = gather_from_sequence_parallel_region(torch.cat([key, value], dim=-1), group=group)
    return attend_to_gathered(query, gathered, chunks, scale)


def attend_to_gathered(query: Tensor, gathered: Tensor, chunks: ContextChunks, scale: float | None) -> Tensor:
    """Attend from the tokens held here, [S / C, A, D], to keys and values laid side by side, rank after rank: [S, G, 2·D]."""
    if query.is_cuda:
        keys, values = gathered.index_select(0, chunks.keys).chunk(2, dim=-1)
        attended = varlen_attn(
            query,
            keys.contiguous(),
            values.contiguous(),
            chunks.query_cu_seqlens,
            chunks.key_cu_seqlens,
            chunks.max_query_tokens,
            chunks.max_key_tokens,
            scale=scale,
            window_size=(-1, 0),  # the last query of a chunk is aligned with the last key it sees
            enable_gqa=keys.shape[1] != query.shape[1],
        )
        assert isinstance(attended, Tensor), "a tuple comes only where the log-sum-exp is asked for"
        return attended
    assert chunks.slots is not None, "made on a CPU"
    parts = [_attend(query, gathered, batch, scale) for batch in chunks.batches]
    return torch.cat(parts).index_select(0, chunks.slots)


def _attend(query: Tensor, gathered: Tensor, batch: ChunkBatch, scale: float | None) -> Tensor:
    """The attended values of a batch's slots, [B · Q, A, D]."""
    queries, keys_and_values = (
        # index_select and not indexing: its backward adds whole rows.
        tensor.index_select(0, positions.flatten()).unflatten(0, positions.shape).transpose(1, 2)
        for tensor, positions in ((query, batch.queries), (gathered, batch.keys))
    )
    keys, values = keys_and_values.chunk(2, dim=-1)
    attended = scaled_dot_product_attention(
        queries, keys, values, attn_mask=batch.sees, scale=scale, enable_gqa=keys.shape[1] != queries.shape[1]
    )
    return attended.transpose(1, 2).flatten(0, 1)


def _place_among_gathered(segment_cu_seqlens: Tensor, num_tokens: int, size: int) -> Tensor:
    """Where each packed token is once the ranks' tokens are laid end to end, [S] int64."""
    gathered = torch.cat([ContextShare(rank, size).positions(segment_cu_seqlens, num_tokens) for rank in range(size)])
    place = torch.empty_like(gathered)
    place[gathered] = torch.arange(num_tokens, device=gathered.device)
    return place


def _batched(keys: Tensor, query_counts: Tensor, key_counts: Tensor) -> tuple[tuple[ChunkBatch, ...], Tensor]:
    """The chunks in padded batches, at most half of whose slots are padding; and `ContextChunks.slots`."""
    first_query, first_key = _bounds(query_counts)[:-1], _bounds(key_counts)[:-1]
    slots = torch.empty(int(query_counts.sum()), dtype=torch.long)
    batches, first_slot = [], 0
    for members in _alike(query_counts):
        num_queries, num_keys = query_counts[members, None], key_counts[members, None]
        query_offsets, key_offsets = torch.arange(int(num_queries.max())), torch.arange(int(num_keys.max()))
        is_query, is_key = query_offsets < num_queries, key_offsets < num_keys
        queries = first_query[members, None] + query_offsets * is_query
        last_seen = num_keys - num_queries + query_offsets
        batches.append(
            ChunkBatch(
                queries=queries,
                keys=keys[first_key[members, None] + key_offsets * is_key],
                sees=(key_offsets <= last_seen[:, :, None]).unsqueeze(1),
            )
        )
        slots[queries[is_query]] = first_slot + torch.arange(queries.numel()).view_as(queries)[is_query]
        first_slot += queries.numel()
    return tuple(batches), slots


def _alike(query_counts: Tensor) -> Iterator[Tensor]:
    """Which chunks go into a batch: early with early and late with late, lengths within a factor of two."""
    length_class = [int(count - 1).bit_length() for count in query_counts.tolist()]
    for wanted in sorted(set(length_class)):
        for is_late in (0, 1):
            yield torch.tensor([i for i, found in enumerate(length_class) if found == wanted and i % 2 == is_late])


def _bounds(counts: Tensor) -> Tensor:
    """[n + 1] int64 from 0."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
