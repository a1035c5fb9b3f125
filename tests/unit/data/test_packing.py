"""Packing: every sample exactly once, within the budget, laid out as `MicroBatch` promises."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_gspo.data.packing import fill_fraction, pack, plan_micro_batches
from megatron_gspo.types import MicroBatch, Sample

PAD = 256
lengths_and_budget = st.tuples(st.lists(st.integers(2, 200), max_size=60), st.integers(2, 150))
sample_shapes = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=8)


@given(lengths_and_budget)
def test_a_plan_has_every_sample_once_and_keeps_the_budget(drawn: tuple[list[int], int]) -> None:
    lengths, budget = drawn
    plan = plan_micro_batches(lengths, budget)

    assert sorted(index for indices in plan for index in indices) == list(range(len(lengths)))
    for indices in plan:
        assert len(indices) == 1 or sum(lengths[index] for index in indices) <= budget


@given(lengths_and_budget)
def test_no_two_micro_batches_of_a_plan_could_be_one(drawn: tuple[list[int], int]) -> None:
    lengths, budget = drawn
    totals = sorted(sum(lengths[index] for index in indices) for indices in plan_micro_batches(lengths, budget))

    assert len(totals) < 2 or totals[0] + totals[1] > budget


@given(lengths_and_budget)
def test_a_plan_is_a_first_fit_of_the_lengths_from_the_longest(drawn: tuple[list[int], int]) -> None:
    lengths, budget = drawn
    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fitting = [held for held in bins if sum(lengths[i] for i in held) + lengths[index] <= budget]
        (fitting[0] if fitting else bins.append([]) or bins[-1]).append(index)

    assert plan_micro_batches(lengths, budget) == [sorted(held) for held in bins]


def test_long_tailed_lengths_fill_micro_batches_almost_completely() -> None:
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(mean=7.5, sigma=1.0, size=2048).astype(int) + 2, 16384).tolist()

    plan = plan_micro_batches(lengths, 16384)

    assert fill_fraction(plan, lengths, 16384) > 0.98
    assert len(plan) <= math.ceil(sum(lengths) / 16384) + 2


def test_fill_fraction_counts_a_longer_than_budget_micro_batch_as_full() -> None:
    assert fill_fraction([[0], [1, 2]], [30, 4, 1], token_budget=10) == 35 / 40


def make_samples(shapes: list[tuple[int, int]]) -> list[Sample]:
    rng = np.random.default_rng(len(shapes))
    return [
        Sample(
            index=100 + position,
            prompt_token_ids=rng.integers(0, 250, size=prompt),
            response_token_ids=rng.integers(0, 250, size=response),
            advantage=float(rng.normal()),
            behaviour_log_probs=rng.normal(size=response).astype(np.float32),
        )
        for position, (prompt, response) in enumerate(shapes)
    ]


def pack_on_cpu(samples: list[Sample], pad_to_multiple: int) -> MicroBatch:
    return pack(samples, pad_to_multiple=pad_to_multiple, pad_token_id=PAD, device="cpu")


@given(shapes=sample_shapes, multiple=st.integers(1, 9))
def test_every_response_is_found_again_behind_the_positions_that_predict_it(
    shapes: list[tuple[int, int]], multiple: int
) -> None:
    samples = make_samples(shapes)
    batch = pack_on_cpu(samples, multiple)

    assert torch.equal(batch.token_ids[batch.predicting_positions + 1], batch.target_token_ids)
    for position, sample in enumerate(samples):
        start, end = batch.segment_cu_seqlens[position : position + 2].tolist()
        segment = batch.token_ids[start:end].tolist()
        assert segment == [*sample.prompt_token_ids, *sample.response_token_ids]
        assert batch.position_ids[start:end].tolist() == list(range(end - start))
        own = slice(*batch.response_cu_seqlens[position : position + 2].tolist())
        assert batch.target_token_ids[own].tolist() == sample.response_token_ids.tolist()
        # The first response token is predicted by the prompt's last token, the last by the one before it.
        first = start + len(sample.prompt_token_ids) - 1
        assert batch.predicting_positions[own].tolist() == list(range(first, end - 1))
        assert batch.behaviour_log_probs[own].numpy().tolist() == sample.behaviour_log_probs.tolist()
        assert batch.advantages[position].item() == np.float32(sample.advantage)
    assert batch.sample_indices == tuple(sample.index for sample in samples)


@given(shapes=sample_shapes, multiple=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_what_was_not_sampled_is_read_and_is_no_response_token(
    shapes: list[tuple[int, int]], multiple: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    whole, masked = make_samples(shapes), []
    for sample in whole:
        is_sampled = rng.random(len(sample.response_token_ids)) < 0.5
        is_sampled[-1] = True
        masked.append(replace(sample, is_sampled=is_sampled))
    batch, all_learned = pack_on_cpu(masked, multiple), pack_on_cpu(whole, multiple)

    kept = torch.from_numpy(np.concatenate([np.empty(0, bool), *(sample.is_sampled for sample in masked)]))
    for name in ("predicting_positions", "target_token_ids", "behaviour_log_probs"):
        assert torch.equal(getattr(batch, name), getattr(all_learned, name)[kept]), name
    assert batch.response_cu_seqlens.diff().tolist() == [sample.num_sampled_tokens for sample in masked]
    for name in ("token_ids", "is_sample_token", "position_ids", "segment_cu_seqlens", "advantages"):
        assert torch.equal(getattr(batch, name), getattr(all_learned, name)), name


def test_advantages_of_tokens_stand_where_those_tokens_do() -> None:
    first, second, third = make_samples([(2, 3), (1, 2), (4, 4)])
    batch = pack_on_cpu(
        [
            replace(first, token_advantages=np.array([1.0, 2.0, 3.0]), is_sampled=np.array([True, False, True])),
            second,
            replace(third, token_advantages=np.array([4.0, 5.0, 6.0, 7.0])),
        ],
        1,
    )
    alike = [np.float32(second.advantage)] * 2
    assert batch.advantages.tolist() == [1.0, 3.0, *alike, 4.0, 5.0, 6.0, 7.0]
    assert batch.advantages.dtype == torch.float32


@given(shapes=sample_shapes, multiple=st.integers(1, 9))
def test_padding_is_a_segment_of_its_own_and_the_least_that_is_needed(
    shapes: list[tuple[int, int]], multiple: int
) -> None:
    num_tokens = sum(prompt + response for prompt, response in shapes)
    batch = pack_on_cpu(make_samples(shapes), multiple)

    padding = batch.num_padding_tokens
    assert 0 <= padding < multiple
    assert len(batch.token_ids) == len(batch.position_ids) == num_tokens + padding
    assert len(batch.token_ids) % multiple == 0
    assert batch.token_ids[num_tokens:].tolist() == [PAD] * padding
    assert batch.position_ids[num_tokens:].tolist() == list(range(padding))
    assert len(batch.segment_cu_seqlens) == len(shapes) + 1 + (padding > 0)
    assert batch.segment_cu_seqlens[-1] == len(batch.token_ids)
    assert batch.max_segment_tokens == batch.segment_cu_seqlens.diff().max()


@given(shapes=sample_shapes, segment_multiple=st.integers(1, 5), factor=st.integers(1, 3))
def test_segments_can_be_filled_up_one_by_one(
    shapes: list[tuple[int, int]], segment_multiple: int, factor: int
) -> None:
    samples = make_samples(shapes)
    batch = pack(
        samples,
        pad_to_multiple=factor * segment_multiple,
        pad_token_id=PAD,
        device="cpu",
        pad_segments_to_multiple=segment_multiple,
    )

    assert (batch.segment_cu_seqlens.diff() % segment_multiple == 0).all()
    assert len(batch.token_ids) % (factor * segment_multiple) == 0
    assert torch.equal(batch.token_ids[batch.predicting_positions + 1], batch.target_token_ids)
    assert batch.num_padding_tokens == int((~batch.is_sample_token).sum())
    assert (batch.token_ids[~batch.is_sample_token] == PAD).all()
    for start, sample in zip(batch.segment_cu_seqlens.tolist(), samples, strict=False):
        end = start + sample.num_tokens
        assert batch.token_ids[start:end].tolist() == [*sample.prompt_token_ids, *sample.response_token_ids]
        assert batch.is_sample_token[start:end].all()


@pytest.mark.parametrize(("multiple", "length"), [(1, 2), (2, 2), (3, 3), (8, 8)])
def test_a_micro_batch_without_samples_is_padding_alone(multiple: int, length: int) -> None:
    batch = pack_on_cpu([], multiple)

    assert batch.num_responses == 0
    assert batch.token_ids.tolist() == [PAD] * length
    assert batch.segment_cu_seqlens.tolist() == [0, length]
    assert batch.response_cu_seqlens.tolist() == [0]
    assert (batch.max_segment_tokens, batch.num_padding_tokens) == (length, length)
    for per_token in (batch.predicting_positions, batch.target_token_ids, batch.behaviour_log_probs, batch.advantages):
        assert per_token.shape == (0,)


@pytest.mark.parametrize("samples", [[], make_samples([(3, 2), (1, 1)])], ids=["empty", "two samples"])
def test_tensors_have_the_contracted_types(samples: list[Sample]) -> None:
    batch = pack_on_cpu(samples, 4)

    for name in ("token_ids", "position_ids", "predicting_positions", "target_token_ids", "response_cu_seqlens"):
        assert getattr(batch, name).dtype == torch.int64, name
    assert batch.segment_cu_seqlens.dtype == torch.int32
    assert batch.advantages.dtype == batch.behaviour_log_probs.dtype == torch.float32


def test_a_sample_without_a_prompt_cannot_be_packed() -> None:
    with pytest.raises(AssertionError, match="predicted by its prompt's last"):
        pack_on_cpu(make_samples([(0, 3)]), 1)
