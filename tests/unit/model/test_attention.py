"""Core attention over packed segments is ordinary attention within each of them."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_gspo.config import ParallelSection
from megatron_gspo.model.attention import CausalAttention, PackedSegments, SegmentBatches
from megatron_gspo.model.build import transformer_config
from tests.tiny_models import dense_config, model_section

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
@given(st.lists(st.integers(0, 19), min_size=1, max_size=9).filter(any))
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
