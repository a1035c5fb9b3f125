"""Reading a rank's part of a checkpoint: several files at the same time, each tensor's bytes to where they belong.

In: a load of Megatron's (`dist_checkpointing.load`). Out: the same tensors. torch's own reader takes a file after the
other, and first makes a tensor of every item in new memory, whose pages cost a processor more than the copying does. Here
torch is asked for a tensor without its bytes, and for where they begin; they are read to where the tensor lives, or through
memory that is used again.
"""

from __future__ import annotations

import io
import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import CachedMetadataFileSystemReader
from torch import Tensor
from torch.distributed.checkpoint import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.futures import Future

from megatron_gspo.training.checkpoint_store import READERS


@contextmanager
def read_in_place() -> Iterator[None]:
    """Within it Megatron reads checkpoints as this module does."""
    # Megatron-Core 0.16.1 makes its reader there, and takes none from outside. (Its reader of object storage is left out.)
    module: Any = torch_strategy
    make_reader = module._get_filesystem_reader
    module._get_filesystem_reader = lambda checkpoint, **_: InPlaceReader(checkpoint)
    try:
        yield
    finally:
        module._get_filesystem_reader = make_reader


class InPlaceReader(CachedMetadataFileSystemReader):
    """Megatron's reader of a checkpoint's directory, but for how tensors are read."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """What torch calls once a load: all of the plan's items, `READERS` files at the same time."""
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            by_file[self.storage_data[item.storage_index].relative_path].append(item)
        with ThreadPoolExecutor(READERS) as readers:
            for _ in readers.map(lambda name: self._read_file(name, by_file[name], planner), by_file):
                pass  # raises what a file's reading raised
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_file(self, name: str, items: list[ReadItem], planner: LoadPlanner) -> None:
        memory = _ReusedMemory()
        with (Path(self.path) / name).open("rb") as file:
            for item in items:
                saved = self.storage_data[item.storage_index]
                assert not saved.transform_descriptors, "this program's checkpoints are written without transforms"
                view = self._slice_file(file, saved)
                if item.type == LoadItemType.BYTE_IO:
                    planner.load_bytes(item, io.BytesIO(view.read()))
                else:
                    target = planner.resolve_tensor(item).detach()
                    _read_tensor(file, saved.offset, cast(BinaryIO, view), item, target, memory)
                    planner.commit_tensor(item, target)


def _read_tensor(
    file: BinaryIO, offset: int, view: BinaryIO, item: ReadItem, target: Tensor, memory: _ReusedMemory
) -> None:
    """Read the part of a saved tensor that `item` asks for into `target`; `view` is of its `torch.save`, from `offset` on."""
    saved = torch.load(view, map_location="meta", weights_only=True)
    part = saved
    for dimension, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        part = part.narrow(dimension, start, length)
    assert part.shape == target.shape, f"{item.storage_index} is {tuple(part.shape)}, not {tuple(target.shape)}"
    if not part.numel():
        return
    # A private name, which torch's own tutorial on GPUDirect Storage reads tensors by.
    begin = offset + saved.untyped_storage()._checkpoint_offset + part.storage_offset() * part.element_size()
    if target.device.type == "cpu" and target.dtype == part.dtype and target.is_contiguous() and part.is_contiguous():
        _read_bytes(file, begin, target)
        return
    # From the part's first element to its last, with what lies between them.
    span = 1 + sum((size - 1) * stride for size, stride in zip(part.shape, part.stride(), strict=True))
    elements = memory.take(span, part.dtype)
    _read_bytes(file, begin, elements)
    target.copy_(elements.as_strided(part.shape, part.stride()))


def _read_bytes(file: BinaryIO, begin: int, into: Tensor) -> None:
    """Fill `into`, contiguous and on the CPU, with the file's bytes from `begin` on."""
    remaining = into.reshape(-1).view(torch.uint8).numpy().data
    while remaining:
        length = os.preadv(file.fileno(), [remaining], begin)
        if not length:
            raise OSError(f"{file.name} ends before the tensors that it should hold")
        remaining, begin = remaining[length:], begin + length


class _ReusedMemory:
    """A file's memory for what cannot be read to where it belongs: on a GPU, in other strides, of another dtype."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        """`count` elements, which hold anything; what was taken before is given up."""
        num_bytes = count * dtype.itemsize
        if len(self._bytes) < num_bytes:
            # Not pinned: torch would keep pinned memory, rounded up to a power of two, for the rest of the run.
            self._bytes = torch.empty(num_bytes, dtype=torch.uint8)
        return self._bytes[:num_bytes].view(dtype)
