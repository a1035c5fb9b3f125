"""Shares a mini-batch's responses out over the data-parallel ranks so that each has about as many tokens.

In: the samples that this rank's own rollouts became, mini-batch by mini-batch, their advantages computed within whole
groups already. Out: the samples this rank trains on. A mini-batch holds the same samples before and after, whatever the
number of ranks; only who computes them changes, and a sample travels only to the rank that does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_gspo import parallel
from megatron_gspo.types import Sample


def share_by_tokens(num_tokens: Sequence[int], num_ranks: int) -> list[int]:
    """Which rank gets each sample: the longest first, each to the rank that has the fewest tokens so far.

    The most loaded rank exceeds the mean by at most one sample. Ties go to the sample and the rank that come first: the
    same on every rank that asks.
    """
    loads = [0] * num_ranks
    rank_of = [0] * len(num_tokens)
    for index in sorted(range(len(num_tokens)), key=lambda index: (-num_tokens[index], index)):
        rank_of[index] = min(range(num_ranks), key=lambda rank: (loads[rank], rank))
        loads[rank_of[index]] += num_tokens[index]
    return rank_of


def rebalance(
    mini_batches: Sequence[Sequence[Sample]], is_learned_from: Callable[[Sample], bool] = lambda _: True
) -> tuple[tuple[Sample, ...], ...]:
    """Exchange samples among data-parallel ranks, by mini-batch; each rank's come out by `Sample.index`.

    A sample that is not learned from weighs next to nothing. A collective among the ranks at the same place in their copies of
    the model.
    """
    num_ranks = parallel.data_size()
    if num_ranks == 1:
        return tuple(tuple(samples) for samples in mini_batches)
    lengths = parallel.gather_over_data_ranks(
        [{s.index: s.num_tokens if is_learned_from(s) else 1 for s in samples} for samples in mini_batches]
    )
    outgoing: list[list[list[Sample]]] = [[[] for _ in mini_batches] for _ in range(num_ranks)]
    for number, samples in enumerate(mini_batches):
        of_all = dict(sorted(entry for rank in lengths for entry in rank[number].items()))
        rank_of = dict(zip(of_all, share_by_tokens(list(of_all.values()), num_ranks), strict=True))
        for sample in samples:
            outgoing[rank_of[sample.index]][number].append(sample)
    incoming = parallel.exchange_over_data_ranks(outgoing)
    return tuple(
        tuple(sorted((sample for rank in incoming for sample in rank[number]), key=lambda sample: sample.index))
        for number in range(len(mini_batches))
    )


def token_imbalance(samples: Sequence[Sample]) -> float:
    """Tokens of the most loaded data-parallel rank over the mean of all ranks; 1 where all have the same."""
    num_tokens = sum(sample.num_tokens for sample in samples)
    mean = parallel.sum_over_data_ranks([float(num_tokens)])[0] / parallel.data_size()
    return parallel.max_over_data_ranks(num_tokens) / mean
