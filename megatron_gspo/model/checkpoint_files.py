"""The files of a Hugging Face checkpoint: safetensors in one file or several with an index, configuration, tokenizer.

In: a directory, or named tensors. Out: tensors by name, of which only the slice asked for is read, or a directory that
Transformers and SGLang load. Safetensors hold data only; nothing here unpickles.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Set
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_gspo.model.weight_layout import Sliceable
from megatron_gspo.types import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

#: Where a checkpoint's files are until all of them are written.
ASIDE = ".incomplete"

#: What of a checkpoint is not weights and is taken over from the template as it is, where it exists.
COPIED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)

_FLOAT_TYPES = ("F32", "BF16", "F16")


def has_weights(path: Path) -> bool:
    """Whether the checkpoint directory has weights, or only a configuration.

    Raises:
        UserError: it has weights, but half written or not as safetensors.
    """
    if any(path.glob("*.safetensors")) or (path / INDEX_FILE).exists():
        return True
    if (path / ASIDE).exists():
        raise UserError(f"model.path: writing the weights of {path} was broken off; write them again")
    for other in sorted(path.glob("pytorch_model*.bin")):
        raise UserError(f"model.path: {other} is a pickle, and only safetensors are read; convert it first")
    return False


class CheckpointReader:
    """The tensors in a checkpoint directory, by name."""

    def __init__(self, path: Path) -> None:
        self._open_files = ExitStack()
        self._file_of: dict[str, Path] = {}
        self._handle_of: dict[Path, safe_open] = {}
        for file in _weight_files(path):
            try:
                handle = self._open_files.enter_context(safe_open(file, framework="pt"))
            except (OSError, SafetensorError) as error:
                self._open_files.close()
                raise UserError(f"{file} cannot be read as safetensors ({error})") from error
            self._handle_of[file] = handle
            self._file_of.update(dict.fromkeys(handle.keys(), file))
        self._path = path

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open_files.close()

    def check(self, expected: Mapping[str, tuple[int, ...]], ignored: Set[str]) -> None:
        """Compare what is there with the `expected` names and shapes; `ignored` names may be there as well.

        Raises:
            UserError: naming the first tensor that is missing, surplus, misshaped or not of a float type, and its file.
        """
        for name, shape in expected.items():
            if name not in self._file_of:
                raise UserError(f"{self._path}: the tensor {name} is missing")
            found = self._slice(name)
            if tuple(found.get_shape()) != shape:
                raise UserError(
                    f"{self._file_of[name]}: the tensor {name} has shape {found.get_shape()}, "
                    f"and by config.json it is {list(shape)}"
                )
            if found.get_dtype() not in _FLOAT_TYPES:
                accepted = ", ".join(_FLOAT_TYPES)
                raise UserError(
                    f"{self._file_of[name]}: the tensor {name} is {found.get_dtype()}, and accepted are {accepted}"
                )
        for name in sorted(self._file_of.keys() - expected.keys() - ignored):
            raise UserError(f"{self._file_of[name]}: the tensor {name} is surplus: the model has no such weight")

    def tensor(self, name: str) -> Sliceable:
        """The tensor `name`, of which indexing reads only the part asked for."""
        return self._slice(name)

    def _slice(self, name: str) -> Any:
        return self._handle_of[self._file_of[name]].get_slice(name)


class CheckpointWriter:
    """Writes a checkpoint directory: tensors are collected file by file, and files appear when all are written."""

    def __init__(
        self, path: Path, template: Path, sizes: Mapping[str, int], dtype: torch.dtype, shard_bytes: int
    ) -> None:
        """`sizes` are the bytes of every tensor, in the order in which they will be added."""
        self._path = path
        self._template = template
        self._dtype = dtype
        self._total_bytes = sum(sizes.values())
        self._file_of = _plan_files(sizes, shard_bytes)
        self._last_of_file = {file: name for name, file in self._file_of.items()}
        self._collected: dict[str, Tensor] = {}
        self._aside = path / ASIDE
        self._aside.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Take the next tensor. What lies in host memory already is not copied: it stays as it is until `finish`."""
        self._collected[name] = tensor.detach().to(device="cpu").contiguous()
        file = self._file_of[name]
        if name == self._last_of_file[file]:
            save_file(self._collected, self._aside / file, metadata={"format": "pt"})
            _make_durable(self._aside / file)
            self._collected.clear()

    def finish(self) -> None:
        """Make the checkpoint appear, in place of the one that was there."""
        assert not self._collected, "every planned tensor was added"
        for former in (self._path / INDEX_FILE, *self._path.glob("*.safetensors")):
            former.unlink(missing_ok=True)
        for name in COPIED_FILES:
            if (self._template / name).exists():
                _copy(self._template / name, self._path / name)
        _replace_text(self._path / "config.json", self._config())
        files = sorted(self._last_of_file)
        for file in files:
            (self._aside / file).replace(self._path / file)
        if len(files) > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": self._file_of}
            _replace_text(self._path / INDEX_FILE, json.dumps(index, indent=2))
        shutil.rmtree(self._aside)
        _make_durable(self._path)

    def _config(self) -> str:
        """The template's configuration, with the dtype that is written."""
        config = json.loads((self._template / "config.json").read_text())
        config.pop("torch_dtype", None)  # its name before Transformers 5
        config["dtype"] = str(self._dtype).removeprefix("torch.")
        return json.dumps(config, indent=2)


def _weight_files(path: Path) -> list[Path]:
    """The files that hold the weights: one, or those an index names."""
    index = path / INDEX_FILE
    if not index.exists():
        if (path / SINGLE_FILE).exists():
            return [path / SINGLE_FILE]
        raise UserError(f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}; it may be half written")
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index} is not an index of safetensors: its weight_map cannot be read") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index}: weight_map names {name!r}, which is not a file of that directory")
        if not (path / name).exists():
            raise UserError(f"{index}: weight_map names {name}, which does not exist")
    return sorted(path / name for name in names)


def _plan_files(sizes: Mapping[str, int], shard_bytes: int) -> dict[str, str]:
    """The file of every tensor, in order; a file holds up to `shard_bytes`, or one tensor that is larger."""
    file_numbers, number, filled = [], 0, 0
    for size in sizes.values():
        if filled and filled + size > shard_bytes:
            number, filled = number + 1, 0
        filled += size
        file_numbers.append(number)
    count = number + 1
    names = [SINGLE_FILE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    return {name: names[number] for name, number in zip(sizes, file_numbers, strict=True)}


def _make_durable(path: Path) -> None:
    """Have what a file, or the names in a directory, hold on the disk before anything else happens."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy(source: Path, target: Path) -> None:
    if source.resolve() != target.resolve():
        shutil.copyfile(source, target)


def _replace_text(path: Path, text: str) -> None:
    """Write `text` so that the file is either the former or the new one."""
    aside = path.with_name(f".{path.name}.incomplete")
    aside.write_text(text)
    aside.replace(path)
