"""Weights by way of a directory: whole or invisible, in files of a bounded size, and gone when they are old."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_gspo.rollout import weight_sync_disk
from megatron_gspo.rollout.weight_sync_disk import DiskWeightSync
from megatron_gspo.types import TrainingFailedError


def weights(count: int = 5) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that nobody else holds, as an exporter's are of what it gathered; some are not contiguous."""
    for number in range(count):
        tensor = torch.full((4, 3), float(number))
        yield f"layer.{number}", tensor.T if number % 2 else tensor


def test_what_is_published_is_what_was_given_whatever_the_files_size(tmp_path: Path):
    sync = DiskWeightSync(tmp_path, "run", shard_bytes=100)
    sync.publish(weights(), version=3)
    files = sorted((tmp_path / "run.3").iterdir())
    assert len(files) == 3
    assert all(file.name.endswith(".safetensors") for file in files)
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert sorted(found) == [f"layer.{number}" for number in range(5)]
    for number, tensor in enumerate(found[f"layer.{number}"] for number in range(5)):
        assert tensor.shape == ((3, 4) if number % 2 else (4, 3))
        assert (tensor == number).all()


def test_files_of_one_size_are_written_from_the_same_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    addresses = set()

    def save_and_note(tensors: dict[str, torch.Tensor], *arguments: object, **options: object) -> None:
        addresses.add(next(iter(tensors.values())).data_ptr())
        save_file(tensors, *arguments, **options)

    monkeypatch.setattr(weight_sync_disk, "save_file", save_and_note)
    sync = DiskWeightSync(tmp_path, "run", shard_bytes=100)
    for version in (1, 2):
        sync.publish(weights(), version)
    assert len(addresses) == 1


def test_weights_that_are_broken_off_are_never_seen(tmp_path: Path):
    sync = DiskWeightSync(tmp_path, "run", shard_bytes=100)

    def broken_off() -> Iterator[tuple[str, torch.Tensor]]:
        yield from weights()
        raise OSError("no space left")

    with pytest.raises(TrainingFailedError, match=r"weights version 1 cannot be written to .*: no space left"):
        sync.publish(broken_off(), version=1)
    assert list(tmp_path.iterdir()) == []
    sync.publish(weights(), version=1)
    assert [path.name for path in tmp_path.iterdir()] == ["run.1"]


def test_older_weights_of_the_run_are_deleted_and_no_others(tmp_path: Path):
    sync, another = DiskWeightSync(tmp_path, "run"), DiskWeightSync(tmp_path, "another")
    for version in (8, 9, 10):
        sync.publish(weights(), version)
        another.publish(weights(), version)
    sync.forget_before(10)
    another.forget_all()
    assert [path.name for path in tmp_path.iterdir()] == ["run.10"]


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingFailedError, match=r"weights version 1 cannot be written to .*file"):
        DiskWeightSync(tmp_path / "file", "run").publish(weights(), version=1)
