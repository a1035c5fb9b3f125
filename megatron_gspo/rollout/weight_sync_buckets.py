"""Weights in flat buckets, as SGLang 0.5.21 receives them under `load_format: flattened_bucket`.

In: named tensors, one after the other. Out: runs of them as one tensor of bytes each, in host memory, with the names,
dtypes and shapes from which a server finds them again (`srt/weight_sync/tensor_bucket.py`: laid end to end, no padding).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Bucket:
    """A few weights in one piece."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]  # as attributes of torch: "bfloat16"
    shapes: tuple[tuple[int, ...], ...]
    data: torch.Tensor  # [bytes] uint8, in host memory; the tensors' bytes, end to end

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights by name, as views of `data`."""
        found, start = {}, 0
        for name, dtype_name, shape in zip(self.names, self.dtypes, self.shapes, strict=True):
            dtype: torch.dtype = getattr(torch, dtype_name)
            end = start + math.prod(shape) * dtype.itemsize
            found[name] = self.data[start:end].view(dtype).reshape(shape)
            start = end
        return found


def pack(
    weights: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int, spare: list[torch.Tensor] | None = None
) -> Iterator[Bucket]:
    """Copy weights into buckets, in order.

    Args:
        weights: a tensor is copied before the next one is asked for.
        bucket_bytes: a bucket's largest size; a single larger tensor has a bucket of its own.
        spare: `Bucket.data` of buckets that are no longer needed. What is used again is taken out; a bucket that is done
            with meanwhile may be put in. New memory costs more than the copy: the kernel clears every page of it first.
    """
    left, filling = [] if spare is None else spare, _Filling(None)
    for name, tensor in weights:
        if filling.names and not filling.has_room(tensor):
            yield filling.bucket()
            filling = _Filling(None)
        if filling.memory is None:
            filling.memory = _memory(max(bucket_bytes, tensor.nbytes), left, pinned=tensor.is_cuda)
        filling.add(name, tensor)
    if filling.names:
        yield filling.bucket()


class _Filling:
    """A bucket to which tensors are still added."""

    def __init__(self, memory: torch.Tensor | None) -> None:
        self.memory = memory
        self.names: list[str] = []
        self._dtypes: list[str] = []
        self._shapes: list[tuple[int, ...]] = []
        self._used = 0

    def has_room(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor fits in, and would begin where the server can read its dtype."""
        assert self.memory is not None, "it was made for its first tensor"
        return self._used + tensor.nbytes <= len(self.memory) and self._used % tensor.itemsize == 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        assert self.memory is not None, "it was made for its first tensor"
        end = self._used + tensor.nbytes
        self.memory[self._used : end].view(tensor.dtype).copy_(tensor.detach().reshape(-1))
        self.names.append(name)
        self._dtypes.append(str(tensor.dtype).removeprefix("torch."))
        self._shapes.append(tuple(tensor.shape))
        self._used = end

    def bucket(self) -> Bucket:
        assert self.memory is not None, "it was made for its first tensor"
        return Bucket(tuple(self.names), tuple(self._dtypes), tuple(self._shapes), self.memory[: self._used])


def _memory(size: int, spare: list[torch.Tensor], *, pinned: bool) -> torch.Tensor:
    """`size` bytes, of a spare bucket's memory where one is as large."""
    for index, tensor in enumerate(spare):
        storage = tensor.untyped_storage()
        if storage.nbytes() == size:
            del spare[index]
            return torch.empty(0, dtype=torch.uint8).set_(storage)
    return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
