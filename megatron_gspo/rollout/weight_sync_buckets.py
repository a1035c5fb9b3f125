"""Weights in flat buckets, as SGLang 0.5.21 receives them under `load_format: flattened_bucket`.

In: named tensors, one after the other. Out: runs of them as one tensor of bytes each, in host memory, with the names,
dtypes and shapes from which a server finds them again (`srt/weight_sync/tensor_bucket.py`: laid end to end, no padding).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from megatron_gspo.rollout.weight_copy import WAITING_BYTES, Stretch


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
        weights: a tensor stays as it is until its bucket is there.
        bucket_bytes: a bucket's largest size; a single larger tensor has a bucket of its own.
        spare: `Bucket.data` of buckets that are no longer needed. What is used again is taken out; a bucket that is done
            with meanwhile may be put in. New memory costs more than the copy: the kernel clears every page of it first.
    """
    left = [] if spare is None else spare
    filling: _Filling | None = None
    for name, tensor in weights:
        num_bytes = tensor.nbytes
        if filling is not None and not filling.has_room(num_bytes, tensor.itemsize):
            yield filling.bucket()
            filling = None
        if filling is None:
            filling = _Filling(_memory(max(bucket_bytes, num_bytes), left, pinned=tensor.is_cuda))
        filling.add(name, tensor, num_bytes)
    if filling is not None:
        yield filling.bucket()


class _Filling:
    """A bucket to which tensors are still added."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory
        self._names: list[str] = []
        self._dtypes: list[str] = []
        self._shapes: list[tuple[int, ...]] = []
        self._waiting: list[Stretch] = []  # what has been added and not been copied yet
        self._size, self._used, self._copied = len(memory), 0, 0

    def has_room(self, num_bytes: int, itemsize: int) -> bool:
        """Whether a tensor fits in, and would begin where the server can read its dtype."""
        return self._used + num_bytes <= self._size and self._used % itemsize == 0

    def add(self, name: str, tensor: torch.Tensor, num_bytes: int) -> None:
        """Take in a tensor, which stays as it is until `bucket`."""
        if self._waiting and self._waiting[-1].is_continued_by(tensor):
            self._waiting[-1].append(tensor)
        else:
            if self._used - self._copied >= WAITING_BYTES:
                self._copy()
            self._waiting.append(Stretch(tensor))
        self._names.append(name)
        self._dtypes.append(_name_of(tensor.dtype))
        self._shapes.append(tuple(tensor.shape))
        self._used += num_bytes

    def bucket(self) -> Bucket:
        """All that was added."""
        self._copy()
        return Bucket(tuple(self._names), tuple(self._dtypes), tuple(self._shapes), self._memory[: self._used])

    def _copy(self) -> None:
        for source in [stretch.flat() for stretch in self._waiting]:
            start, self._copied = self._copied, self._copied + source.nbytes
            self._memory[start : self._copied].view(source.dtype).copy_(source)
        self._waiting.clear()


@functools.cache
def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _memory(size: int, spare: list[torch.Tensor], *, pinned: bool) -> torch.Tensor:
    """`size` bytes, of a spare bucket's memory where one is as large."""
    for index, tensor in enumerate(spare):
        storage = tensor.untyped_storage()
        if storage.nbytes() == size:
            del spare[index]
            return torch.empty(0, dtype=torch.uint8).set_(storage)
    return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
