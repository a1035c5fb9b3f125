"""Core attention for models without Transformer Engine: causal, over packed (`thd`) or padded (`sbhd`) input.

In: queries, keys and values of this rank's heads. Out: what each token attends to, by content and rotary position. Packed
segments never see each other. Megatron's own DotProductAttention (0.16.1) takes no packed input and materialises the
whole score matrix.

On a GPU one variable-length kernel does all segments. It has no CPU version, so there segments of similar length are
padded to batches: each batch is one call, and at most half of its slots are padding. Under context parallelism
`context_attention` does it.

Shape legend: S packed tokens, B batch, L tokens of a sequence, A attention heads, G key-value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from megatron_gspo.model.context_attention import ContextChunks, attend_across_ranks
from megatron_gspo.model.rotary import RotaryTable

_FEW_TOKENS = 64
"""Up to so many a segment, PyTorch's attention kernel for the CPU, made for blocks, costs more than plain products."""


@dataclass(frozen=True)
class SegmentBatches:
    """How to lay packed segments out as padded batches and back; made once a micro-batch, used by every layer."""

    positions: tuple[Tensor, ...]  # for each batch [B, L] int64 into S; padding slots repeat the segment's first token
    slots: Tensor  # [S] int64: where each packed token is among the batches' slots, laid end to end

    @classmethod
    def of(cls, cu_seqlens: Tensor) -> SegmentBatches:
        """Group the segments [cu_seqlens[i], cu_seqlens[i + 1]) by length, within a factor of two."""
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.long().diff()
        length_class = [int(length - 1).bit_length() if length else -1 for length in lengths.tolist()]
        slots = torch.empty(int(cu_seqlens[-1]), dtype=torch.long)
        positions, first_slot = [], 0
        for wanted in sorted(set(length_class) - {-1}):
            members = torch.tensor([index for index, found in enumerate(length_class) if found == wanted])
            offsets = torch.arange(int(lengths[members].max()))
            is_token = offsets < lengths[members, None]
            batch = starts[members, None] + offsets * is_token
            slots[batch[is_token]] = first_slot + torch.arange(batch.numel()).view_as(batch)[is_token]
            positions.append(batch)
            first_slot += batch.numel()
        return cls(tuple(positions), slots)


@dataclass
class PackedSegments(PackedSeqParams):
    """Megatron's description of packed input, with the layout that attention on a CPU uses."""

    batches: SegmentBatches | None = None
    chunks: ContextChunks | None = None  # where the segments are cut over context-parallel ranks
    rotary: RotaryTable | None = None  # of the tokens held here; None where queries and keys come rotated

    @classmethod
    def of(
        cls,
        cu_seqlens: Tensor,
        max_segment_tokens: int,
        chunks: ContextChunks | None = None,
        rotary: RotaryTable | None = None,
    ) -> PackedSegments:
        """Segments [cu_seqlens[i], cu_seqlens[i + 1]) int32, none longer than `max_segment_tokens`.

        With `chunks`, bounds and lengths are the whole segments' all the same: so Megatron and Transformer Engine, which
        cut them for themselves, want them.
        """
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=max_segment_tokens,
            max_seqlen_kv=max_segment_tokens,
            batches=None if cu_seqlens.is_cuda or chunks is not None else SegmentBatches.of(cu_seqlens),
            chunks=chunks,
            rotary=rotary,
        )


class CausalAttention(MegatronModule):
    """Megatron's core-attention module on PyTorch's attention; it has no parameters."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal, "only causal self-attention"
        assert attention_type == "self", "only causal self-attention"
        del layer_number, cp_comm_type
        if config.context_parallel_size > 1:
            assert pg_collection is not None, "Megatron's SelfAttention passes it on"
            self.context_group = pg_collection.cp
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend causally.

        Args:
            query: [S, A, D] packed (under context parallelism the tokens this rank holds), or [L, B, A, D] with padding only at the end of each sequence.
            key, value: the same with G heads; each serves A / G queries.
            attention_mask: must be None: the mask is causal, and padding at the end is seen by padding alone.

        Returns:
            [S, A, D] packed (a batch dimension is the caller's), or [L, B, A · D].
        """
        assert attention_mask is None, "the mask is causal; padding goes to the end of a sequence"
        assert attention_bias is None, "no attention bias"
        del attn_mask_type
        if packed_seq_params is None:
            assert self.config.context_parallel_size == 1, "context parallelism takes packed input"
            query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
            return self._attend(query, key, value).permute(2, 0, 1, 3).flatten(2)
        if isinstance(packed_seq_params, PackedSegments) and packed_seq_params.rotary is not None:
            query, key = packed_seq_params.rotary.rotate(query), packed_seq_params.rotary.rotate(key)
        if self.config.context_parallel_size > 1:
            assert isinstance(packed_seq_params, PackedSegments) and packed_seq_params.chunks is not None
            return attend_across_ranks(
                query, key, value, packed_seq_params.chunks, self.context_group, self.softmax_scale
            )
        if query.is_cuda:
            attended = varlen_attn(
                query,
                key,
                value,
                packed_seq_params.cu_seqlens_q,
                packed_seq_params.cu_seqlens_kv,
                packed_seq_params.max_seqlen_q,
                packed_seq_params.max_seqlen_kv,
                scale=self.softmax_scale,
                window_size=(-1, 0),
                enable_gqa=key.shape[1] != query.shape[1],
            )
            assert isinstance(attended, Tensor), "a tuple comes only where the log-sum-exp is asked for"
            return attended
        assert isinstance(packed_seq_params, PackedSegments)
        assert packed_seq_params.batches is not None
        return self._attend_in_batches(query, key, value, packed_seq_params.batches)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, A, L, D] each, with G heads in keys and values."""
        if query.device.type == "cpu" and query.shape[2] <= _FEW_TOKENS:
            return _attend_to_few(query, key, value, self.softmax_scale)
        return scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )

    def _attend_in_batches(self, query: Tensor, key: Tensor, value: Tensor, batches: SegmentBatches) -> Tensor:
        attended = []
        for positions in batches.positions:
            # index_select and not indexing: its backward adds whole rows.
            q, k, v = (
                tensor.index_select(0, positions.flatten()).unflatten(0, positions.shape).transpose(1, 2)
                for tensor in (query, key, value)
            )
            attended.append(self._attend(q, k, v).transpose(1, 2).flatten(0, 1))
        return torch.cat(attended).index_select(0, batches.slots)


def _attend_to_few(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """[B, A, L, D] as three operations on all scores; queries that share a key-value head are rows of one product."""
    num_tokens, num_shared = query.shape[2], query.shape[1] // key.shape[1]
    queries, keys, values = (
        heads.reshape(key.shape[0] * key.shape[1], -1, key.shape[3]) for heads in (query, key, value)
    )
    mask = query.new_full((num_tokens, num_tokens), -torch.inf).triu(1).repeat(num_shared, 1)
    scale = key.shape[3] ** -0.5 if scale is None else scale
    scores = torch.baddbmm(mask.expand(len(keys), -1, -1), queries, keys.transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(dim=-1), values).view(query.shape)
