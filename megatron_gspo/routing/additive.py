"""Statistics that add up: over micro-batches with `+`, over ranks with one all-reduce of `to_vector()`.

In: frozen dataclasses whose tensor fields are counts or sums, and whose other fields say what was counted. Out: the same
of the union of the measured things.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

import torch


@dataclass(frozen=True, eq=False)
class Additive:
    """Base of statistics that add up. Tensor fields are added; the others are labels, equal in whatever is added."""

    def __add__(self, other: Self) -> Self:
        """The statistics of both sets of measurements, which must not overlap."""
        assert type(other) is type(self), f"cannot add {type(other).__name__} to {type(self).__name__}"
        assert self._labels() == other._labels(), f"cannot add {other._labels()} to {self._labels()}"
        others = other._tensors()
        return dataclasses.replace(self, **{name: mine + others[name] for name, mine in self._tensors().items()})

    def to_vector(self) -> torch.Tensor:
        """All counts and sums, [length] float64 on their device. Counts below 2^53 stay exact."""
        return torch.cat([tensor.reshape(-1).double() for tensor in self._tensors().values()])

    def from_vector(self, vector: torch.Tensor) -> Self:
        """What `vector`, as `to_vector` lays it out, says about the things this instance is about."""
        mine = self._tensors()
        assert vector.shape == (sum(tensor.numel() for tensor in mine.values()),), "the vector has another layout"
        parts = vector.split([tensor.numel() for tensor in mine.values()])
        return dataclasses.replace(
            self,
            **{
                # A sum of whole numbers is whole: the conversion back to integers loses nothing.
                name: part.reshape(tensor.shape).to(tensor.dtype)
                for (name, tensor), part in zip(mine.items(), parts, strict=True)
            },
        )

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self._fields().items() if isinstance(value, torch.Tensor)}

    def _labels(self) -> dict[str, object]:
        return {name: value for name, value in self._fields().items() if not isinstance(value, torch.Tensor)}

    def _fields(self) -> dict[str, object]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
