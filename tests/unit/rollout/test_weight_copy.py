"""Neighbours are copied together, whatever lies beside them is left alone, and every bit arrives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_gspo.rollout import weight_copy
from megatron_gspo.rollout.weight_copy import WeightCopier
from megatron_gspo.rollout.weight_sync_buckets import pack


class CountedCopies(TorchDispatchMode):
    """The sizes of the copies that are made meanwhile, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


def copied(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> list[int]:
    """The sizes of the copies that took `sources` to `targets`."""
    copier = WeightCopier()
    with CountedCopies() as copies:
        for source, target in zip(sources, targets, strict=True):
            copier.add(source, target)
        copier.finish()
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(target, source.to(target.dtype))
    return copies.sizes


def test_matrices_that_are_stacked_on_both_sides_are_one_copy():
    stack, places = torch.randn(4, 6, 5), torch.zeros(4, 6, 5)
    halves = [half for matrix in stack.unbind() for half in matrix.chunk(2)]
    assert copied(halves, [half for matrix in places.unbind() for half in matrix.chunk(2)]) == [120]


def test_a_copy_converts_to_the_targets_dtype():
    stack, places = torch.randn(4, 6), torch.zeros(4, 6, dtype=torch.bfloat16)
    assert copied(stack.unbind(), places.unbind()) == [24]


def test_what_is_no_neighbour_on_one_side_is_a_copy_of_its_own():
    stack = torch.randn(4, 6)
    turned = list(reversed(torch.zeros(4, 6).unbind()))
    assert copied(stack.unbind(), turned) == [6, 6, 6, 6]
    assert copied(turned, torch.zeros(4, 6).unbind()) == [6, 6, 6, 6]
    gap = torch.zeros(5, 6)
    assert copied(stack.unbind(), [gap[0], gap[1], gap[3], gap[4]]) == [12, 12]
    assert gap[2].eq(0).all()


def test_neighbours_in_memory_that_are_tensors_of_their_own_are_not_joined():
    memory = bytearray(64)  # two storages, the second where the first ends
    first = torch.frombuffer(memory, dtype=torch.float32, count=8)
    second = torch.frombuffer(memory, dtype=torch.float32, count=8, offset=32)
    assert second.data_ptr() == first.data_ptr() + first.nbytes
    first.copy_(torch.randn(8))
    second.copy_(torch.randn(8))
    assert copied([first, second], torch.zeros(2, 8).unbind()) == [8, 8]


def test_tensors_that_are_not_contiguous_or_of_another_dtype_arrive_one_by_one():
    columns = torch.randn(3, 4)
    sources = [columns[:, :2], columns[:, 2:], columns.bfloat16(), columns.T]
    targets = [torch.zeros(source.shape, dtype=source.dtype) for source in sources]
    assert copied(sources, targets) == [6, 6, 12, 12]


def test_a_target_that_is_no_view_of_memory_end_to_end_is_refused():
    with pytest.raises(AssertionError, match="written to"):
        WeightCopier().add(torch.zeros(4, 3), torch.zeros(3, 4).T)


def test_only_so_much_waits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weight_copy, "WAITING_BYTES", 40)
    copier = WeightCopier()
    sources, targets = [torch.randn(4) for _ in range(5)], [torch.zeros(4) for _ in range(5)]
    with CountedCopies() as copies:
        for number, (source, target) in enumerate(zip(sources, targets, strict=True)):
            copier.add(source, target)
            assert len(copies.sizes) == (3 if number >= 3 else 0)
        copier.finish()
    assert copies.sizes == [4] * 5


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.booleans()), max_size=12),
    st.sampled_from([1, 16, 40, 64, 10**6]),
)
def test_any_pieces_of_any_stacks_arrive_in_buckets_bit_by_bit(pieces: list[tuple[int, int, bool]], bucket_bytes: int):
    stacks = [torch.randn(6, 4, 2, dtype=dtype) for dtype in (torch.float32, torch.bfloat16) for _ in range(2)]
    tensors = {
        str(number): stacks[stack][row].T if turned else stacks[stack][row]
        for number, (stack, row, turned) in enumerate(pieces)
    }
    buckets = list(pack(tensors.items(), bucket_bytes))
    assert all(len(bucket.data) <= bucket_bytes or len(bucket.names) == 1 for bucket in buckets)
    found = {name: tensor for bucket in buckets for name, tensor in bucket.tensors().items()}
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_a_bucket_that_is_full_ends_a_copy():
    stack = torch.randn(10, 4)
    with CountedCopies() as copies:
        buckets = list(pack(((str(row), tensor) for row, tensor in enumerate(stack.unbind())), bucket_bytes=64))
    assert [len(bucket.names) for bucket in buckets] == [4, 4, 2]
    assert copies.sizes == [16, 16, 8]
    assert torch.equal(torch.cat([bucket.data for bucket in buckets]), stack.view(-1).view(torch.uint8))
