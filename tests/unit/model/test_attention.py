"""Core attention over packed segments is ordinary attention within each of them."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_gspo.config import ParallelSection
from megatron_gspo.context_parallel import ContextShare
from megatron_gspo.model.attention import CausalAttention, PackedSegments, SegmentBatches
from megatron_gspo.model.build import transformer_config
from megatron_gspo.model.context_attention import ContextChunks, attend_to_gathered
from tests.tiny_models import dense_config, micro_batch, model_section

HEADS, GROUPS, SIZE = 4, 2, 8


def module() -> CausalAttention:
    config = transformer_config(dense_config(), model_section(), ParallelSection())
    return CausalAttention(config, 1, AttnMaskType.causal, "self")


def cu_seqlens(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def attention_by_the_formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q kᵀ / √D, causal) v in float64, for one sequence [L, A, D]."""
    query = query.double()
    key, value = (tensor.double().repeat_interleave(HEADS // GROUPS, dim=1) for tensor in (key, value))
    scores = torch.einsum("qad,kad->aqk", query, key) / SIZE**0.5
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return torch.einsum("aqk,kad->qad", scores.masked_fill(future, -torch.inf).softmax(-1), value)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 19), st.integers(63, 66)), min_size=1, max_size=9).filter(any))
def test_packed_attention_is_attention_within_each_segment(lengths: list[int]):
    query, key, value = (
        torch.randn(sum(lengths), heads, SIZE, requires_grad=True) for heads in (HEADS, GROUPS, GROUPS)
    )
    packed = PackedSegments.of(cu_seqlens(lengths), max(lengths))
    output = module()(query, key, value, None, packed_seq_params=packed)
    segments = zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True)
    expected = torch.cat([attention_by_the_formula(*segment) for segment in segments])
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(output)
    found = torch.autograd.grad(output, (query, key, value), upstream)
    reference = torch.autograd.grad(expected, (query, key, value), upstream.double())
    for gradient, other in zip(found, reference, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    chunk_lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    num_ranks=st.integers(2, 4),
    seed=st.integers(0, 9),
)
def test_ranks_that_cut_the_segments_attend_as_one_rank_does(chunk_lengths: list[int], num_ranks: int, seed: int):
    lengths = [2 * num_ranks * length for length in chunk_lengths]
    torch.manual_seed(seed)
    query, key, value = (
        torch.randn(sum(lengths), heads, SIZE, requires_grad=True) for heads in (HEADS, GROUPS, GROUPS)
    )
    batch = micro_batch([torch.zeros(length, dtype=torch.long) for length in lengths])
    shares = [ContextShare(rank, num_ranks) for rank in range(num_ranks)]
    held = [share.positions(batch.segment_cu_seqlens, sum(lengths)) for share in shares]
    gathered = torch.cat([torch.cat([key, value], dim=-1)[positions] for positions in held])
    output = torch.cat(
        [
            attend_to_gathered(query[positions], gathered, ContextChunks.of(batch, share), None)
            for positions, share in zip(held, shares, strict=True)
        ]
    )[torch.cat(held).argsort()]
    segments = zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True)
    expected = torch.cat([attention_by_the_formula(*segment) for segment in segments])
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(output)
    found = torch.autograd.grad(output, (query, key, value), upstream)
    reference = torch.autograd.grad(expected, (query, key, value), upstream.double())
    for gradient, other in zip(found, reference, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)


@given(chunk_lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), num_ranks=st.integers(2, 4))
def test_every_rank_compares_equally_many_pairs(chunk_lengths: list[int], num_ranks: int):
    batch = micro_batch([torch.zeros(2 * num_ranks * length, dtype=torch.long) for length in chunk_lengths])
    pairs = set()
    for rank in range(num_ranks):
        positions = ContextShare(rank, num_ranks).positions(batch.segment_cu_seqlens, len(batch.token_ids))
        pairs.add(int((batch.position_ids[positions] + 1).sum()))
        chunks = ContextChunks.of(batch, ContextShare(rank, num_ranks))
        assert chunks.query_cu_seqlens[-1] == len(positions) and chunks.key_cu_seqlens[-1] == len(chunks.keys)
        assert chunks.max_query_tokens == chunks.query_cu_seqlens.diff().max()
        assert chunks.max_key_tokens == chunks.key_cu_seqlens.diff().max()
    assert len(pairs) == 1


def test_padded_attention_is_attention_within_each_sequence():
    query, key, value = (torch.randn(6, 3, heads, SIZE) for heads in (HEADS, GROUPS, GROUPS))
    output = module()(query, key, value, None)
    for sequence in range(3):
        expected = attention_by_the_formula(query[:, sequence], key[:, sequence], value[:, sequence])
        torch.testing.assert_close(output[:, sequence].double(), expected.flatten(1), rtol=1e-5, atol=1e-5)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=30).filter(any))
def test_at_most_half_of_the_batches_is_padding(lengths: list[int]):
    batches = SegmentBatches.of(cu_seqlens(lengths))
    num_slots = sum(positions.numel() for positions in batches.positions)
    assert sum(lengths) <= num_slots <= 2 * sum(lengths)
    end_to_end = torch.cat([positions.flatten() for positions in batches.positions])
    assert torch.equal(end_to_end[batches.slots], torch.arange(sum(lengths)))
