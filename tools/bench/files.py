"""Plain files, as fast as Python writes and reads them: what writers of weights and checkpoints are held against.

All are timed by `CLOCK`, which stands while files are deleted: that takes a file system from none to twice as long as
writing them, depending on what of them is on the disk, and what replaces them does not wait for it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

PIECE_BYTES = 1 << 24


class Clock:
    """The clock on the wall, but for what is done while it is `stopped`."""

    def __init__(self) -> None:
        self._stopped_for = 0.0

    def __call__(self) -> float:
        """Seconds."""
        return time.perf_counter() - self._stopped_for

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Within it no time passes."""
        started = time.perf_counter()
        yield
        self._stopped_for += time.perf_counter() - started


CLOCK = Clock()


def delete(path: Path) -> None:
    """Delete a file or a directory, if it is there, in no time."""
    with CLOCK.stopped():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_raw(path: Path, data: torch.Tensor, *, sync: bool) -> None:
    """Write `data`, [bytes] uint8, into a file that then takes the place of `path`; with `sync` it is on the disk on return.

    Beside the former file, as weights and checkpoints are written: in place of a file that had just been deleted, a write
    took a third to a fifth of the time on a virtual machine.
    """
    beside = path.with_name(f"{path.name}.new")
    with beside.open("wb", buffering=0) as file:
        for piece in data.split(PIECE_BYTES):
            file.write(piece.numpy())
        if sync:
            os.fsync(file.fileno())
    delete(path)
    with CLOCK.stopped():
        beside.rename(path)


def read_raw(path: Path, into: torch.Tensor) -> None:
    """Read a file of as many bytes into `into`, [bytes] uint8."""
    with path.open("rb", buffering=0) as file:
        for piece in into.split(PIECE_BYTES):
            read = file.readinto(piece.numpy())
            assert read == len(piece), "the file is as long as the tensor"


def forget_cached(directory: Path) -> None:
    """Have the kernel drop what it keeps of the files in `directory`, which must be on the disk, from memory."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
