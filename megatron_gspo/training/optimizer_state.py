"""Optimizer states on their way into a checkpoint and out of it, where no other rank has a part of them.

In: Megatron's distributed optimizers. Out: within `without_gathering`, those whose data-parallel group is this rank alone
(experts that are on no other rank, or a run of one replica) give their states as they are. Megatron-Core 0.16.1 would copy
each five times into new memory, gathering from a group of one (optimizer/distrib_optimizer.py, get_parameter_state_dp_zero).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_STATES = ("param", "exp_avg", "exp_avg_sq")


class _ByParameter:
    """What Megatron takes for one tensor of a whole buffer, from which it cuts each parameter's range."""

    def __init__(self) -> None:
        self.starting_at: dict[int, torch.Tensor] = {}

    def __getitem__(self, cut: slice) -> torch.Tensor:
        return self.starting_at[cut.start]


@contextmanager
def without_gathering(optimizers: Iterable[Any]) -> Iterator[None]:
    """Within it such optimizers give their states, [elements] float32 a parameter, without a copy."""
    alone = [
        optimizer
        for optimizer in optimizers
        if hasattr(optimizer, "gbuf_ranges") and optimizer.data_parallel_group.size() == 1
    ]
    for optimizer in alone:
        optimizer.get_parameter_state_dp_zero = functools.partial(_as_they_are, optimizer)
    try:
        yield
    finally:
        for optimizer in alone:
            del optimizer.get_parameter_state_dp_zero


def _as_they_are(optimizer: Any, **options: Any) -> dict[Any, Any]:
    """What `get_parameter_state_dp_zero` returns; `options` say how to gather, and to give empty tensors for a load.

    A load fills the live states instead.
    """
    del options
    found: dict[Any, Any] = {"buckets_coalesced": True}
    for index, by_dtype in enumerate(optimizer.gbuf_ranges):
        starts = optimizer.buffers[index].param_index_map
        found[index] = {}
        for dtype, buckets in by_dtype.items():
            states = found[index][dtype] = {name: _ByParameter() for name in _STATES}
            for parameter in (parameter for bucket in buckets for parameter in bucket["param_map"]):
                held = optimizer._get_main_param_and_optimizer_states(parameter)
                for name in _STATES:
                    states[name].starting_at[starts[parameter][0]] = held[name].detach()
    return found
