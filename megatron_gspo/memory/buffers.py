"""What Megatron's data-parallel buffers and optimizer allocate for a list of parameters.

In: the parameters of one chunk that are reduced over one group. Out: the elements of the buffer, padding included, and
how many parameter elements each data-parallel rank updates.

The rules are those of Megatron-Core 0.16.1, distributed/param_and_grad_buffer.py (`_ParamAndGradBuffer.__init__`) without
overlap: one bucket a buffer, but one more for a tied embedding. Under `parallel.overlap_gradient_reduce` there are more
buckets, and the padding at the end of each of those is not reckoned. With the
distributed optimizer every parameter begins at a multiple of 64 elements, and a bucket ends at a multiple of 128 and of
the number of ranks, each of which owns an equal part of it (optimizer/distrib_optimizer.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_gspo.memory.shapes import Parameter

PARAMETER_ALIGNMENT = 64  # elements
BUCKET_ALIGNMENT = 128


@dataclass(frozen=True)
class Buffer:
    """The buffer of one chunk's dense or expert parameters."""

    numel: int  # with padding
    numel_unpadded: int
    owned: tuple[int, ...]  # parameter elements that each data-parallel rank updates


def plan_buffer(parameters: Sequence[Parameter], num_ranks: int, *, sharded: bool) -> Buffer:
    """The buffer of `parameters`, reduced over `num_ranks`; `sharded` with the distributed optimizer."""
    whole = sum(parameter.numel for parameter in parameters)
    if not sharded:
        return Buffer(whole, whole, (whole,) * num_ranks)
    owned = [0] * num_ranks
    end = 0
    for bucket in _buckets(parameters):
        start, ranges = end, []
        for parameter in bucket:
            first = _round_up(end, PARAMETER_ALIGNMENT)
            end = first + parameter.numel
            ranges.append((first - start, end - start))
        end = start + _round_up(end - start, math.lcm(num_ranks, BUCKET_ALIGNMENT))
        _add_owned(owned, ranges, (end - start) // num_ranks)
    return Buffer(end, whole, tuple(owned))


def _buckets(parameters: Sequence[Parameter]) -> list[list[Parameter]]:
    """The parameters in the order of their gradients, that is backwards; an embedding that two stages hold by itself."""
    buckets: list[list[Parameter]] = [[]]
    for parameter in reversed(parameters):
        if parameter.shared_embedding:
            buckets += [[parameter], []]
        else:
            buckets[-1].append(parameter)
    return [bucket for bucket in buckets if bucket]


def _add_owned(owned: list[int], ranges: Sequence[tuple[int, int]], share: int) -> None:
    for first, end in ranges:
        for rank in range(first // share, -(-end // share)):
            owned[rank] += min(end, (rank + 1) * share) - max(first, rank * share)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
