"""What gloo lacks of NCCL: collectives of parts that differ in length between ranks.

Megatron-Core 0.16.1 gathers the tokens of an expert over its expert-tensor-parallel ranks, and scatters the sums back
(tensor_parallel/mappings.py). Each rank brings as many tokens as its router sent: unequal parts, wherever those ranks do
not hold the same tokens or experts are spread over several. NCCL takes them; gloo wants equal ones.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist


@functools.cache
def allow_unequal_parts() -> None:
    """Give Megatron's two collectives along the first dimension a form for unequal parts. Again is harmless."""
    mappings: Any = importlib.import_module("megatron.core.tensor_parallel.mappings")
    mappings._gather_along_first_dim = _where_unequal(mappings._gather_along_first_dim, gather_unequal)
    mappings._reduce_scatter_along_first_dim = _where_unequal(
        mappings._reduce_scatter_along_first_dim, reduce_scatter_unequal
    )


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
