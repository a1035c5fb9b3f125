"""Weights for SGLang servers by way of a directory: `weight_sync.WeightSync` over a file system.

In: every parameter once, under its Hugging Face name, and a version. Out: safetensors, written once, which each server
loads: over any number of machines that share a file system, and again at any time, which is how a server that was
started anew catches up. Any process of the run can send them.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_gspo.rollout.sglang_http import ServerFaultError, SglangHttp
from megatron_gspo.rollout.weight_sync_buckets import pack
from megatron_gspo.types import TrainingFailedError

SHARD_BYTES = 2**30


class DiskWeightSync:
    """Weights by way of a directory; see the module's description."""

    def __init__(self, directory: Path, run_id: str, *, shard_bytes: int = SHARD_BYTES) -> None:
        """
        Args:
            directory: seen by this machine and by the servers' under one path.
            run_id: unique among the runs that share the directory or the servers.
            shard_bytes: the largest file; a single larger weight has one of its own. As much of a GPU's weights is held in
                host memory, from the first version on.
        """
        self._directory = directory
        self._run_id = run_id
        self._shard_bytes = shard_bytes
        self._memory: list[torch.Tensor] = []  # where the last file's weights were copied to, for the next one's

    def label(self, version: int) -> str:
        """See `WeightSync.label`."""
        return f"{self._run_id}.{version}"

    def publish(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Write the weights aside and rename them, so that a server never finds half of them.

        Raises:
            TrainingFailedError: they cannot be written.
        """
        aside = self._directory / f".{self.label(version)}.incomplete"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            self._write(aside, weights)
            shutil.rmtree(self._path(version), ignore_errors=True)
            aside.rename(self._path(version))
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise TrainingFailedError(
                f"weights version {version} cannot be written to {self._directory} for the SGLang servers: {error}"
            ) from error

    async def send(self, http: SglangHttp, url: str, version: int) -> bool:
        """See `WeightSync.send`. Cached keys and values, which the former weights made, are dropped with them."""
        body = {
            "model_path": str(self._path(version)),
            "load_format": "safetensors",  # a server that was started with "dummy" would draw random ones again
            "weight_version": self.label(version),
            "flush_cache": True,
        }
        answer = await http.ask(url, "/update_weights_from_disk", body)
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise ServerFaultError(f"{url}/update_weights_from_disk answered {answer!r}")
        return True

    def forget_before(self, version: int) -> None:
        """Delete older weights of this run."""
        for path in self._directory.glob(f"{self._run_id}.*"):
            if path.suffix.removeprefix(".").isdecimal() and int(path.suffix[1:]) < version:
                shutil.rmtree(path, ignore_errors=True)

    def take_resyncs(self) -> int:
        """See `WeightSync.take_resyncs`: none is ever brought up to date but by `send`."""
        return 0

    def close(self) -> None:
        """See `WeightSync.close`. The files go with `forget_all`, by their owner."""

    def forget_all(self) -> None:
        """Delete all weights of this run."""
        for path in (*self._directory.glob(f"{self._run_id}.*"), *self._directory.glob(f".{self._run_id}.*")):
            shutil.rmtree(path, ignore_errors=True)

    def _path(self, version: int) -> Path:
        return self._directory / self.label(version)

    def _write(self, directory: Path, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for number, tensors in enumerate(self._files(iter(weights))):
            save_file(tensors, directory / f"model-{number:05}.safetensors", metadata={"format": "pt"})

    def _files(self, weights: Iterator[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
        """What each file holds, in host memory; weights that lie there already are not copied."""
        first = next(weights, None)
        if first is None:
            return
        weights = itertools.chain([first], weights)
        if is_in_host_memory(first[1]):
            yield from _runs(weights, self._shard_bytes)
            return
        for bucket in pack(weights, self._shard_bytes, self._memory):
            yield bucket.tensors()
            self._memory.append(bucket.data)


def is_in_host_memory(tensor: torch.Tensor) -> bool:
    """Whether a file can be written from where the tensor is."""
    return tensor.device.type == "cpu"


def _runs(weights: Iterator[tuple[str, torch.Tensor]], most_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    """Consecutive weights of at most `most_bytes` together, or a single larger one."""
    run: dict[str, torch.Tensor] = {}
    num_bytes = 0
    for name, tensor in weights:
        if run and num_bytes + tensor.nbytes > most_bytes:
            yield run
            run, num_bytes = {}, 0
        run[name] = tensor.detach().contiguous()
        num_bytes += tensor.nbytes
    if run:
        yield run
