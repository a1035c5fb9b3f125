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


@pytest.fixture(params=["host", "gpu"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where weights are taken to lie: a GPU's are copied to host memory."""
    if request.param == "gpu":
        monkeypatch.setattr(weight_sync_disk, "is_in_host_memory", lambda tensor: False)
    return request.param


@pytest.mark.usefixtures("place")
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


def test_weights_in_host_memory_are_written_from_where_they_are_and_a_gpus_from_memory_that_is_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
):
    addresses, held = [], dict(weights())

    def save_and_note(tensors: dict[str, torch.Tensor], *arguments: object, **options: object) -> None:
        addresses.append(next(iter(tensors.values())).data_ptr())
        save_file(tensors, *arguments, **options)

    monkeypatch.setattr(weight_sync_disk, "save_file", save_and_note)
    sync = DiskWeightSync(tmp_path, "run", shard_bytes=100)
    for version in (1, 2):
        sync.publish(held.items(), version)
    assert len(addresses) == 6
    if place == "host":  # the first of each file
        assert addresses == 2 * [held[f"layer.{number}"].data_ptr() for number in (0, 2, 4)]
    else:
        assert len(set(addresses)) == 1
        assert not set(addresses) & {tensor.data_ptr() for tensor in held.values()}


def test_a_version_without_weights_is_an_empty_directory(tmp_path: Path):
    DiskWeightSync(tmp_path, "run").publish([], version=1)
    assert list((tmp_path / "run.1").iterdir()) == []


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
