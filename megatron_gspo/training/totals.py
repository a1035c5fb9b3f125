"""Sums, counts and maxima that add up: over micro-batches, mini-batches and, once a step, over ranks.

In: (sum, count) pairs and maxima, from whichever ranks measured them. Out: the same on every rank, of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from megatron_gspo import parallel


@dataclass
class Totals:
    """A step's measurements on this rank."""

    sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)

    def count(self, name: str, number: float) -> None:
        """Add to a plain count, which is reported as it is."""
        self.counts[name] = self.counts.get(name, 0.0) + number

    def add(self, name: str, value: float, count: float) -> None:
        """Add `value`, the sum over `count` things, to what is under `name`."""
        total, total_count = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (total + value, total_count + count)

    def add_all(self, entries: Mapping[str, tuple[torch.Tensor | float, torch.Tensor | float]]) -> None:
        """Add every (sum, count) pair of `entries`."""
        for name, (value, count) in entries.items():
            self.add(name, float(value), float(count))

    def raise_to(self, entries: Mapping[str, torch.Tensor | float]) -> None:
        """Keep the larger of each maximum."""
        for name, value in entries.items():
            self.maxima[name] = max(self.maxima.get(name, float("-inf")), float(value))

    def over_ranks(self, *, measured_here: bool) -> Totals:
        """The totals of all ranks, on every rank.

        Tensor-parallel ranks measure the same things and stages before the last none of them: exactly the ranks with
        `measured_here` count, one a data-parallel share.
        """
        combined = Totals()
        for rank in parallel.gather_objects(self if measured_here else Totals()):
            combined.add_all(rank.sums)
            combined.raise_to(rank.maxima)
            for name, number in rank.counts.items():
                combined.count(name, number)
        return combined
