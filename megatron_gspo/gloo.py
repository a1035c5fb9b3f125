"""What gloo lacks of NCCL: collectives of parts that differ in length between ranks, and in place on one rank.

Megatron-Core 0.16.1 gathers the tokens of an expert over its expert-tensor-parallel ranks, and scatters the sums back
(tensor_parallel/mappings.py). Each rank brings as many tokens as its router sent: unequal parts, wherever those ranks do
not hold the same tokens or experts are spread over several. NCCL takes them; gloo wants equal ones.

The distributed optimizer scatters the sums of gradients, and gathers parameters, from and to parts of the same memory
(distributed/param_and_grad_buffer.py). In a group of one, as experts have that are spread over all ranks, nothing is to
be done; gloo copies all of it, gradients and then parameters, each into new memory and back.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist


@functools.cache
def prepare_gloo() -> None:
    """Give Megatron's collectives a form for unequal parts, its optimizer's one for groups of one. Again is harmless."""
    mappings: Any = importlib.import_module("megatron.core.tensor_parallel.mappings")
    mappings._gather_along_first_dim = _where_unequal(mappings._gather_along_first_dim, gather_unequal)
    mappings._reduce_scatter_along_first_dim = _where_unequal(
        mappings._reduce_scatter_along_first_dim, reduce_scatter_unequal
    )
    buffers: Any = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
    buffers.dist_reduce_scatter_func = _skipping_in_place_of_one(buffers.dist_reduce_scatter_func)
    buffers.dist_all_gather_func = _skipping_in_place_of_one(buffers.dist_all_gather_func)


def gather_unequal(own: torch.Tensor, group: dist.ProcessGroup, lengths: Sequence[int]) -> torch.Tensor:
    """Every rank's `own`, of `lengths[rank]` rows, laid end to end."""
    padded = own.new_zeros(max(lengths), *own.shape[1:])
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def reduce_scatter_unequal(whole: torch.Tensor, group: dist.ProcessGroup, lengths: Sequence[int]) -> torch.Tensor:
    """The sum of all ranks' `whole`, of which rank r gets its `lengths[r]` rows."""
    total = whole.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total.split(list(lengths))[group.rank()].clone()


def _where_unequal(
    equal: Callable[..., torch.Tensor], unequal: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """Megatron's `equal`, and `unequal` where the ranks' lengths are given."""

    @functools.wraps(equal)
    def collective(
        tensor: torch.Tensor,
        group: dist.ProcessGroup,
        lengths: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if lengths is None or group.size() == 1:
            return equal(tensor, group, lengths, use_global_buffer)
        return unequal(tensor, group, lengths)

    return collective


def _skipping_in_place_of_one(collective: Callable[..., dist.Work | None]) -> Callable[..., dist.Work | None]:
    """`collective`, and nothing where one rank would copy memory to itself and nobody waits for a handle."""

    @functools.wraps(collective)
    def skipping(
        output: torch.Tensor, given: torch.Tensor, *, group: dist.ProcessGroup, async_op: bool, **options: Any
    ) -> dist.Work | None:
        if group.size() == 1 and not async_op and output.data_ptr() == given.data_ptr():
            return None
        return collective(output, given, group=group, async_op=async_op, **options)

    return skipping
