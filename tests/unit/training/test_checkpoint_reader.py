"""Reading a checkpoint's tensors to where they belong: the numbers that were saved."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from megatron_gspo.training.checkpoint_reader import InPlaceReader, _read_tensor, _ReusedMemory


def written(directory: Path) -> dict[str, Any]:
    """A checkpoint of several items a file, in two files, by torch."""
    state = {
        "matrix": torch.randn(7, 5),
        "rounded": torch.randn(3, 4).to(torch.bfloat16),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 3),
        "transposed": torch.randn(4, 6).t(),
        "words": {"step": 3},
    }
    dcp.save(state, storage_writer=dcp.FileSystemWriter(directory, thread_count=2))
    assert len(list(directory.glob("*.distcp"))) == 2
    return state


def test_a_checkpoint_is_read_into_the_tensors_that_are_there(tmp_path: Path) -> None:
    state = written(tmp_path)
    targets: dict[str, Any] = {
        name: torch.zeros_like(value) if torch.is_tensor(value) else {"step": 0} for name, value in state.items()
    }
    targets["matrix"] = torch.zeros(5, 7).t()  # strides of its own
    where = {name: target.data_ptr() for name, target in targets.items() if torch.is_tensor(target)}
    dcp.load(targets, storage_reader=InPlaceReader(tmp_path))
    assert targets.pop("words") == state.pop("words")
    for name, expected in state.items():
        assert torch.equal(targets[name], expected), name
        assert targets[name].data_ptr() == where[name], "read into the tensor that was there"


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    is_transposed=st.booleans(),
    to_another_dtype=st.booleans(),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_any_part_of_a_tensor_is_that_part(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], is_transposed: bool, to_another_dtype: bool, data: Any
) -> None:
    saved = torch.randn(shape)
    if is_transposed:
        saved = saved.transpose(0, -1)
    starts = [data.draw(st.integers(0, size - 1)) for size in saved.shape]
    lengths = [data.draw(st.integers(0, size - start)) for size, start in zip(saved.shape, starts, strict=True)]
    expected = saved[tuple(slice(start, start + length) for start, length in zip(starts, lengths, strict=True))]
    target = torch.zeros(lengths, dtype=torch.float64 if to_another_dtype else torch.float32)
    read(tmp_path_factory.mktemp("part") / "file", saved, starts, lengths, target)
    assert torch.equal(target, expected.to(target.dtype))


def test_a_file_that_ends_early_is_an_error_and_not_zeros(tmp_path: Path) -> None:
    saved = torch.randn(1000)
    with pytest.raises(OSError, match="ends before the tensors"):
        read(tmp_path / "file", saved, [0], [1000], torch.zeros(1000), cut=3000)


def test_memory_for_what_cannot_be_read_in_place_is_used_again() -> None:
    memory = _ReusedMemory()
    large = memory.take(100, torch.float32)
    small = memory.take(10, torch.bfloat16)
    assert (large.shape, small.shape, small.dtype) == ((100,), (10,), torch.bfloat16)
    assert small.data_ptr() == large.data_ptr()


def read(
    path: Path, saved: Tensor, starts: list[int], lengths: list[int], target: Tensor, cut: int | None = None
) -> None:
    """Write `saved` behind other bytes, cut the tensor's bytes at `cut`, and read the part."""
    offset = 37
    with io.BytesIO() as buffer:
        torch.save(saved, buffer)
        whole = buffer.getvalue()
    path.write_bytes(b"\0" * offset + (whole if cut is None else whole[:cut]))
    index = MetadataIndex("tensor")
    item = ReadItem(LoadItemType.TENSOR, index, torch.Size(starts), index, torch.Size(starts), torch.Size(lengths))
    with path.open("rb") as file:
        _read_tensor(file, offset, io.BytesIO(whole), item, target, _ReusedMemory())
