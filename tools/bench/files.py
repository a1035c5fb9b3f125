"""Plain files, as fast as Python writes and reads them: what writers of weights and checkpoints are held against."""

from __future__ import annotations

import os
from pathlib import Path

import torch

PIECE_BYTES = 1 << 24


def write_raw(path: Path, data: torch.Tensor, *, sync: bool) -> None:
    """Write `data`, [bytes] uint8, into a new file; with `sync` it is on the disk on return."""
    path.unlink(missing_ok=True)
    with path.open("wb", buffering=0) as file:
        for piece in data.split(PIECE_BYTES):
            file.write(piece.numpy())
        if sync:
            os.fsync(file.fileno())


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
