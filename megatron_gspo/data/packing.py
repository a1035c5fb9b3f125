"""Arranges samples into packed micro-batches.

In: samples of very different lengths, and a token budget. Out: a plan, which says what samples go together, and for each
part of it the `MicroBatch` that the model reads. The plan is made once a step, so that the old-policy pass and the updates
see the same micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_gspo.types import MicroBatch, Sample

_FEWEST_TOKENS = 2  # of a micro-batch without samples: it passes through layers that take no empty input


class _Bins:
    """Room left in bins 0, 1, 2, …, with the first bin of enough room found in O(log bins).

    A heap-ordered tree: leaf `size + i` holds bin i's room, and every inner node the larger of its two children's.
    """

    def __init__(self, num_bins: int, room: int) -> None:
        self._size = 1 << max(0, num_bins - 1).bit_length()
        self._room = [room] * (2 * self._size)

    def take_first(self, amount: int) -> int:
        """The first bin with at least `amount` of room, from which it is taken."""
        node = 1
        while node < self._size:
            node *= 2
            if self._room[node] < amount:
                node += 1
        found = node - self._size
        self._room[node] -= amount
        while node > 1:
            node //= 2
            self._room[node] = max(self._room[2 * node], self._room[2 * node + 1])
        return found


def plan_micro_batches(num_tokens: Sequence[int], token_budget: int) -> list[list[int]]:
    """What samples go into which micro-batch: first-fit decreasing, in O(n log n), and the same for the same lengths.

    Args:
        num_tokens: each sample's tokens, prompt and response together.
        token_budget: tokens a micro-batch is filled to at most; a longer sample is a micro-batch of its own.

    Returns:
        Indices into `num_tokens`, each exactly once, ascending in every micro-batch; micro-batches with the longest
        samples first. No two micro-batches could be one.
    """
    assert token_budget > 0, "the recipe's check holds this"
    longest_first = sorted(range(len(num_tokens)), key=lambda index: (-num_tokens[index], index))
    plan = [[index] for index in longest_first if num_tokens[index] > token_budget]
    fitting = longest_first[len(plan) :]
    bins = _Bins(len(fitting), token_budget)
    filled: dict[int, list[int]] = {}
    for index in fitting:
        filled.setdefault(bins.take_first(num_tokens[index]), []).append(index)
    return plan + [sorted(indices) for indices in filled.values()]


def fill_fraction(plan: Sequence[Sequence[int]], num_tokens: Sequence[int], token_budget: int) -> float:
    """The share of the plan's token budget that samples fill; a longer-than-budget micro-batch counts as full."""
    sums = [sum(num_tokens[index] for index in indices) for indices in plan]
    return sum(sums) / sum(max(total, token_budget) for total in sums)


def pack(
    samples: Sequence[Sample],
    *,
    pad_to_multiple: int,
    pad_token_id: int,
    device: torch.device | str,
    pad_segments_to_multiple: int = 1,
) -> MicroBatch:
    """Lay samples one after the other, each prompt followed by its response.

    Args:
        samples: in packing order; every prompt has a token, and every response one that was sampled. Without any, the micro-batch is
            padding alone, which keeps a rank in step with others that have more.
        pad_to_multiple: the packed length is a multiple of this; padding is a segment of its own at the end.
        pad_token_id: what padding holds; nothing attends to it from outside its segment.
        device: where the tensors go.
        pad_segments_to_multiple: each sample's segment is filled up to a multiple of this, which divides
            `pad_to_multiple`.
    """
    assert pad_to_multiple % pad_segments_to_multiple == 0, "or the padding at the end would be no whole segment"
    prompt_lengths = np.array([len(sample.prompt_token_ids) for sample in samples], dtype=np.int64)
    response_lengths = np.array([len(sample.response_token_ids) for sample in samples], dtype=np.int64)
    is_sampled = [_is_sampled(sample) for sample in samples]

    sample_lengths = prompt_lengths + response_lengths
    segment_lengths = _segment_lengths(sample_lengths, pad_segments_to_multiple, pad_to_multiple)
    segment_ends = np.cumsum(segment_lengths)

    starts = (segment_ends - segment_lengths)[: len(samples)]
    is_sample_token = np.zeros(int(segment_ends[-1]), dtype=bool)
    is_sample_token[_count_up(starts, sample_lengths)] = True
    token_ids = np.full(len(is_sample_token), pad_token_id, dtype=np.int64)
    token_ids[is_sample_token] = _join(
        [ids for sample in samples for ids in (sample.prompt_token_ids, sample.response_token_ids)], np.int64
    )

    learned = _join(is_sampled, np.bool_)  # of all response tokens, in packing order

    def of_learned(parts: Sequence[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
        return _join(parts, dtype)[learned]

    def tensor(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device=device, dtype=dtype)

    return MicroBatch(
        token_ids=tensor(token_ids, torch.int64),
        is_sample_token=tensor(is_sample_token, torch.bool),
        position_ids=tensor(_count_up(np.zeros_like(segment_lengths), segment_lengths), torch.int64),
        segment_cu_seqlens=tensor(np.concatenate([[0], segment_ends]), torch.int32),
        max_segment_tokens=int(segment_lengths.max()),
        predicting_positions=tensor(_count_up(starts + prompt_lengths - 1, response_lengths)[learned], torch.int64),
        target_token_ids=tensor(of_learned([s.response_token_ids for s in samples], np.int64), torch.int64),
        response_cu_seqlens=tensor(
            np.concatenate([[0], np.cumsum([s.num_sampled_tokens for s in samples])]), torch.int64
        ),
        sample_indices=tuple(sample.index for sample in samples),
        advantages=tensor(_advantages(samples, is_sampled), torch.float32),
        behaviour_log_probs=tensor(of_learned([s.behaviour_log_probs for s in samples], np.float32), torch.float32),
        num_padding_tokens=int((~is_sample_token).sum()),
        staleness=tensor(of_learned([_staleness(sample) for sample in samples], np.int64), torch.int64),
    )


def _staleness(sample: Sample) -> np.ndarray:
    return np.zeros(len(sample.response_token_ids), np.int64) if sample.staleness is None else sample.staleness


def _segment_lengths(sample_lengths: np.ndarray, pad_segments_to_multiple: int, pad_to_multiple: int) -> np.ndarray:
    """[N], and one more where padding alone is needed at the end: each sample's tokens with those that fill its segment up."""
    segment_lengths = -(-sample_lengths // pad_segments_to_multiple) * pad_segments_to_multiple
    wanted = int(segment_lengths.sum()) if len(sample_lengths) else _FEWEST_TOKENS
    at_the_end = -(-wanted // pad_to_multiple) * pad_to_multiple - int(segment_lengths.sum())
    return np.append(segment_lengths, at_the_end) if at_the_end else segment_lengths


def _is_sampled(sample: Sample) -> np.ndarray:
    """[response] bool, of a sample that can be learned from."""
    assert len(sample.prompt_token_ids) > 0, "a response's first token is predicted by its prompt's last"
    assert sample.num_sampled_tokens > 0, "a response has at least one sampled token"
    assert len(sample.behaviour_log_probs) == len(sample.response_token_ids), "one log-prob a response token"
    return np.ones(len(sample.response_token_ids), dtype=bool) if sample.is_sampled is None else sample.is_sampled


def _advantages(samples: Sequence[Sample], is_sampled: Sequence[np.ndarray]) -> np.ndarray:
    """[N] float32, one a response; or [T] of all sampled tokens, where a response has one a token."""
    if all(sample.token_advantages is None for sample in samples):
        return np.array([sample.advantage for sample in samples], dtype=np.float32)
    of_tokens = [
        np.full(mask.sum(), sample.advantage) if sample.token_advantages is None else sample.token_advantages[mask]
        for sample, mask in zip(samples, is_sampled, strict=True)
    ]
    return _join(of_tokens, np.float32).astype(np.float32)


def _count_up(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, … for `length` entries, for every start in turn: [sum of lengths] int64."""
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum()), dtype=np.int64) + np.repeat(starts - before, lengths)


def _join(parts: Sequence[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=dtype), *parts])
