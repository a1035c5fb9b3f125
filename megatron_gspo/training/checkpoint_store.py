"""The directories that checkpoints of a run lie in: each is whole or does not exist.

    checkpoints/.step_6.part   being written
    checkpoints/step_6         whole, from the moment of its renaming on; manifest.json has the digest of every other file
    checkpoints/latest         names the newest, as JSON, for people and scripts
    checkpoints/.step_2.old    being deleted

In: files that were written aside. Out: a checkpoint, by renaming; the whole ones there are, and damage found by file.
Digests find damage, not forgery, so they are XXH3's of 128 bits, which is as fast as memory: SHA-256, which processors
without instructions for it make 0.2 to 0.5 GB of a second, took longer than the disk. The manifest names its algorithm.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
POINTER = "latest"

_NAME = re.compile(r"step_(\d+)")
_LEFTOVER = re.compile(r"\.step_\d+\.(part|old)|\.latest\.part")
_OF_A_RANK = re.compile(r"__(\d+)_\d+\.distcp")
_READ_BYTES = 1 << 18  # fits a processor's second-level cache, from which it is hashed
#: Files that are read at the same time: while one waits for the disk the other is copied or hashed.
READERS = 2

#: What a manifest may name. Written is the first; the other stands in older ones.
_ALGORITHMS: dict[str, Callable[[], Any]] = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}
_ALGORITHM = "xxh3_128"


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run."""

    directory: Path

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first."""
        if not self.directory.is_dir():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self.directory.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` is, or will be."""
        return self.directory / f"step_{step}"

    def start(self, step: int) -> Path:
        """An empty directory to write the checkpoint of `step` into; what an interrupted save left goes."""
        self.remove_leftovers()
        aside = self.directory / f".step_{step}.part"
        aside.mkdir(parents=True)
        return aside

    def finish(self, step: int, aside: Path, hashes: Mapping[str, str], *, keep: int) -> None:
        """Make what was written into `aside` the checkpoint of `step`; keep it and the `keep` - 1 before it.

        Later checkpoints are of a run that was given up for this one, and go too. What goes is out of sight at once, and
        deleted by `remove_leftovers`. `hashes` are the digests of all files (`hash_files`).
        """
        _write_durably(aside / MANIFEST, Manifest(_ALGORITHM, dict(hashes)).text)
        _sync_directory(aside)
        self._set_aside(step)
        aside.rename(self.path(step))
        _sync_directory(self.directory)
        pointer = self.directory / f".{POINTER}.part"
        _write_durably(pointer, json.dumps({"checkpoint": self.path(step).name}) + "\n")
        pointer.rename(self.directory / POINTER)
        kept = [saved for saved in self.steps() if saved <= step][-keep:]
        for superseded in set(self.steps()) - set(kept):
            self._set_aside(superseded)

    def remove_leftovers(self) -> None:
        """Delete what was superseded, and what interrupted saves and deletions left."""
        if not self.directory.is_dir():
            return
        for path in self.directory.iterdir():
            if not _LEFTOVER.fullmatch(path.name):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def pointer_problem(self) -> str | None:
        """What is wrong with the pointer, where it cannot be read or names no checkpoint; None where nothing is."""
        pointer = self.directory / POINTER
        if not pointer.exists():
            return None
        try:
            named = json.loads(pointer.read_bytes())["checkpoint"]
        except (ValueError, KeyError, TypeError):
            return f"{pointer} is damaged"
        if not isinstance(named, str) or not _NAME.fullmatch(named) or not (self.directory / named).is_dir():
            return f"{pointer} names {named!r}, which is no checkpoint"
        return None

    def _set_aside(self, step: int) -> None:
        """Take the checkpoint of `step`, if there is one, out of sight in one move, for deletion."""
        if self.path(step).exists():
            self.path(step).rename(self.directory / f".step_{step}.old")


def new_digest() -> Any:
    """What hashes a file that is written: it has `update` and `hexdigest`."""
    return _ALGORITHMS[_ALGORITHM]()


def file_names(checkpoint: Path) -> list[str]:
    """Relative names of all files in a checkpoint but its manifest, sorted."""
    files = (path for path in checkpoint.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(checkpoint)) for path in files if path != checkpoint / MANIFEST)


def hash_files(checkpoint: Path, names: Iterable[str]) -> dict[str, str]:
    """The digest of each of the named files by relative name, which are made durable on the way."""
    hashes = {}
    for name in names:
        with (checkpoint / name).open("rb") as file:
            os.fsync(file.fileno())
        hashes[name] = _digest(checkpoint / name, _ALGORITHM)
    return hashes


class Manifest(NamedTuple):
    """What `manifest.json` says."""

    algorithm: str  # one of `_ALGORITHMS`
    files: dict[str, str]  # the digest of each file by relative name

    @property
    def text(self) -> str:
        """The file, which has a digest of itself."""
        listed = json.dumps(dict(sorted(self.files.items())), indent=2)
        own = _ALGORITHMS[self.algorithm]()
        own.update(listed.encode())
        return json.dumps({f"{self.algorithm}_of_files": own.hexdigest(), "files": json.loads(listed)}, indent=2) + "\n"


def read_manifest(checkpoint: Path) -> Manifest | None:
    """What the manifest says; None where it is missing or is not what was written."""
    try:
        text = (checkpoint / MANIFEST).read_text()
        content = json.loads(text)
        algorithm = next(name for name in _ALGORITHMS if f"{name}_of_files" in content)
        manifest = Manifest(algorithm, content["files"])
        return manifest if manifest.text == text else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
        return None


def damaged_files(checkpoint: Path, *, share: int = 0, num_shares: int = 1) -> list[Path]:
    """Files that are missing or are not what was written, of one of the shares into which all files are divided.

    Where as many ranks wrote tensors, a rank's share has those of the rank with its number, which it finds in memory when
    it loads them.
    """
    manifest = read_manifest(checkpoint)
    if manifest is None:
        return [checkpoint / MANIFEST]
    listed = sorted(manifest.files)
    writers = {name: int(match[1]) for name in listed if (match := _OF_A_RANK.fullmatch(name))}
    if len(set(writers.values())) != num_shares:
        writers = {}
    names = [name for place, name in enumerate(listed) if writers.get(name, place) % num_shares == share]

    def is_whole(name: str) -> bool:
        path = checkpoint / name
        return path.is_file() and _digest(path, manifest.algorithm) == manifest.files[name]

    with ThreadPoolExecutor(READERS) as readers:
        return [checkpoint / name for name, whole in zip(names, readers.map(is_whole, names), strict=True) if not whole]


def _digest(path: Path, algorithm: str) -> str:
    digest = _ALGORITHMS[algorithm]()
    block = memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(block):
            digest.update(block[:length])
    return str(digest.hexdigest())


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
