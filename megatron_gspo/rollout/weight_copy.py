"""Copies of many tensors, as few and as far apart as their memory allows.

In: tensors, one after the other, each with the place it goes to. Out: the same values there. Neighbours that go to
neighbouring places are one copy: a layer's expert matrices lie end to end in a parameter that stacks them, in a bucket,
and in Transformers' model. Copies wait for each other, because code that runs after one finds nothing left in the
processor's cache: many tensors are looked at, then all are copied.
"""

from __future__ import annotations

from torch import Tensor

#: Tensors wait until together they have this many bytes: so much is held of what was gathered for this export alone.
WAITING_BYTES = 2**25


class Stretch:
    """Tensors of one dtype that lie end to end in one storage, or a single tensor that lies in any way."""

    def __init__(self, first: Tensor) -> None:
        self._first = first.detach()
        self._length = first.numel()
        self._end = first.storage_offset() + self._length if first.is_contiguous() else -1
        self._end_address = first.data_ptr() + first.nbytes

    def is_continued_by(self, tensor: Tensor) -> bool:
        """Whether `tensor` begins where the stretch ends; in the same storage, because no tensor may span two of them."""
        return (
            tensor.data_ptr() == self._end_address
            and tensor.storage_offset() == self._end
            and tensor.dtype == self._first.dtype
            and tensor.is_contiguous()
        )

    def append(self, tensor: Tensor) -> None:
        """Take in a tensor that continues the stretch."""
        length = tensor.numel()
        self._length += length
        self._end += length
        self._end_address += tensor.nbytes

    def flat(self) -> Tensor:
        """[elements]: all of them as one tensor; a view, unless it is a single one that is not contiguous."""
        return self._first.reshape(-1) if self._end < 0 else self._first.as_strided((self._length,), (1,))


class WeightCopier:
    """Copies tensors into others and converts their dtype; when `finish` is called, all of it has happened."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Stretch, Stretch]] = []
        self._waiting_bytes = 0

    def add(self, source: Tensor, target: Tensor) -> None:
        """Copy `source`, which stays as it is until `finish`, into `target`, which is contiguous and of the same shape."""
        if self._waiting:
            sources, targets = self._waiting[-1]
            if sources.is_continued_by(source) and targets.is_continued_by(target):
                sources.append(source)
                targets.append(target)
                self._waiting_bytes += source.nbytes
                return
        assert target.is_contiguous(), "what is written to is a view"
        if self._waiting_bytes >= WAITING_BYTES:
            self.finish()
        self._waiting.append((Stretch(source), Stretch(target)))
        self._waiting_bytes += source.nbytes

    def finish(self) -> None:
        """Copy what has not been copied yet."""
        for sources, targets in self._waiting:
            targets.flat().copy_(sources.flat())
        self._waiting.clear()
        self._waiting_bytes = 0
