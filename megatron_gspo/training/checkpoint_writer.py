"""Writing a rank's part of a checkpoint, in a thread of its own.

In: what Megatron leaves to do of a save (the asynchronous half of `dist_checkpointing.save`). Out: this rank's files, on the
disk, and their digests. The run may go on at once; it may change its tensors as soon as they are `copied`.

Megatron's own callers fork or spawn a process instead (strategies/async_utils.py). A forked one inherits the locks of
threads that it does not have, and outlives a rank that was killed, writing where the next run writes; the spawned one
needs CUDA. Copying, writing, syncing and hashing leave Python's lock to the run, so a thread is enough.
"""

from __future__ import annotations

import io
import queue
import threading
import time
from collections.abc import Set
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from megatron_gspo.platform import device
from megatron_gspo.training.checkpoint_store import new_digest

#: A file's path, its name, and its bytes and tensors with what Megatron plans for each.
_Bucket = tuple[str, str, tuple[Any, Any]]


class Writer(threading.Thread):
    """Copies, writes and hashes this rank's part. A daemon: a rank that has to end does not wait for it.

    Args:
        request: what Megatron leaves to do.
        live: where the tensors begin that the run will change (`addresses`); they are copied before `copied` is set.
            Empty where the run waits for the save.
    """

    def __init__(self, request: AsyncRequest, live: Set[int]) -> None:
        super().__init__(name="checkpoint writer", daemon=True)
        self._request, self._live, self._device = request, live, device()
        self.copied = threading.Event()
        self.hashes: dict[str, str] = {}  # by file name; whole when the thread has ended without an error
        self.error: BaseException | None = None
        self.seconds = 0.0

    def run(self) -> None:
        started = time.perf_counter()
        try:
            # A thread begins on the first GPU, whichever the rank's is.
            with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
                buckets = self._on_host()
            self.copied.set()
            if self._request.async_fn is not None:
                rank, _, results = self._request.async_fn_args
                self.hashes = self._request.async_fn(rank, buckets, results)
        except BaseException as error:  # handed to the rank's main thread, which raises it
            self.error = error
        finally:
            self.copied.set()
        self.seconds = time.perf_counter() - started

    def _on_host(self) -> list[_Bucket]:
        """What this rank writes, in host memory that the run does not change."""
        if self._request.preload_fn is None:
            return []

        # Float32 weights are saved twice, as the model's and as the optimizer's.
        copies: dict[tuple[int, int, torch.dtype], torch.Tensor] = {}

        def kept(tensor: torch.Tensor) -> torch.Tensor:
            start = tensor.untyped_storage().data_ptr()
            if start not in self._live:
                return tensor
            memory = start, tensor.nbytes, tensor.dtype
            if memory not in copies:
                copies[memory] = tensor.clone()
            return copies[memory].view(tensor.shape)

        return [
            (path, name, (in_bytes, [(item, kept(tensor)) for item, tensor in tensors]))
            for path, name, (in_bytes, tensors) in self._request.preload_fn()
        ]


def give_own_storages(sharded: dict[str, Any]) -> None:
    """Put every tensor of `sharded` that lies in host memory under a storage that holds it alone, without a copy.

    Megatron copies those whose storages hold more (strategies/filesystem_async.py, `_clone_if_needed`), since torch would
    write the whole storage; and most weights are parts of one buffer.
    """
    for value in held_here(sharded):
        value.data = _with_own_storage(value.data)


def addresses(sharded: dict[str, Any], storages: Set[int]) -> frozenset[int]:
    """Where the tensors of `sharded` begin that lie in one of these storages, which are given by where they begin."""
    data = (value.data for value in held_here(sharded))
    return frozenset(tensor.data_ptr() for tensor in data if tensor.untyped_storage().data_ptr() in storages)


def held_here(sharded: dict[str, Any]) -> list[ShardedTensor | ShardedTensorFactory]:
    """What of `sharded` this rank has data of."""
    kinds = ShardedTensor | ShardedTensorFactory
    return [value for value in nested_values(sharded) if isinstance(value, kinds) and value.data is not None]


def _with_own_storage(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    is_part = tensor.untyped_storage().nbytes() != tensor.nbytes
    if is_part and tensor.is_cpu and tensor.is_contiguous() and tensor.numel() > 0:
        own = torch.from_numpy(tensor.reshape(-1).view(torch.uint8).numpy())  # bytes: NumPy has no bfloat16
        return own.view(tensor.dtype).view(tensor.shape)
    return tensor


def prepare_writer() -> None:
    """Have Megatron write the next checkpoint within the rank; nothing that an earlier one left is taken for its own."""
    # dist_checkpointing/strategies/filesystem_async.py: a rank forks processes that write, and waits for each to report;
    # one that dies without a report (it is killed, or psutil, asked for a debug message, is missing) is waited for for
    # ever. Reports go through a server of `multiprocessing` that outlives a killed rank and holds its output open.
    module: Any = filesystem_async
    module._results_queue = queue.SimpleQueue()
    module._process_memory = lambda: 0
    module.FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(_write_in_this_process)


def _write_in_this_process(
    transforms: list[Any], use_msc: bool, rank: int, buckets: list[_Bucket], results: queue.SimpleQueue[Any]
) -> dict[str, str]:
    """Write each bucket to its file and report, in the words of Megatron's `write_preloaded_data_multiproc`.

    Files are written at the same time, so that the disk is kept busy. Returns the digest of each by its name.
    """
    del transforms, rank
    files = [_File(index, bucket, use_msc) for index, bucket in enumerate(buckets)]
    for file in files:
        file.start()
    for file in files:
        file.join()
    failure = next((file.outcome for file in files if isinstance(file.outcome, Exception)), None)
    results.put(failure or {index: file.outcome for index, file in enumerate(files)})
    return {Path(file.path).name: file.digest.hexdigest() for file in files}


class _File(threading.Thread):
    """Writes a file of a checkpoint, and hashes what passes: one reading of the memory less than hashing the file."""

    def __init__(self, index: int, bucket: _Bucket, use_msc: bool) -> None:
        super().__init__(name=f"checkpoint writer of file {index}", daemon=True)
        self._index, self._bucket, self._use_msc = index, bucket, use_msc
        self.path = bucket[0]
        self.digest = new_digest()
        #: What Megatron gathers of it, or the exception that it met.
        self.outcome: Any = RuntimeError(f"{self.path}: its writer ended without a report")

    def run(self) -> None:
        # torch would check-sum every record of its archives, which takes about as long as writing them; the file is hashed. The
        # option is a thread's own.
        torch.serialization.set_crc32_options(False)
        report: queue.SimpleQueue[Any] = queue.SimpleQueue()
        unfinished: queue.Queue[int] = queue.Queue()
        unfinished.put(self._index)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            [self], self._index, self._bucket, report, unfinished, use_fsync=True, use_msc=self._use_msc
        )
        _, self.outcome = report.get()

    def transform_save_stream(self, item: Any, stream: io.IOBase) -> tuple[_HashedStream, list[str]]:
        """What torch calls for every item it writes: where to write it, and the names of transforms to undo (none)."""
        del item
        return _HashedStream(stream, self.digest), []


class _HashedStream:
    """Writes to a stream that stays open, and hashes what is written."""

    def __init__(self, stream: Any, digest: Any) -> None:
        self._stream, self._digest = stream, digest

    def write(self, data: Any) -> int:
        self._digest.update(data)
        written: int = self._stream.write(data)
        return written

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        """The stream is the file's, and the next item goes into it too."""
