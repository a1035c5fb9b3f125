"""Saving checkpoints, beside the run where the recipe allows it.

In: a run after a step. Out: its checkpoint in the store, whole, or an error on all ranks and the older ones as they were.

The run stands still until what is to be written is planned. Then a thread of each rank copies, writes and hashes what that
rank holds (`checkpoint_writer.py`), while the run goes on; before it changes its tensors it waits for the copy. What all
ranks must agree on (that all have written, Megatron's index, the renaming) is done where they meet: after a later step,
before the next save, at the end. What the new checkpoint supersedes is deleted by a thread of the main rank.
"""

from __future__ import annotations

import io
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch.distributed.checkpoint.api import CheckpointException

from megatron_gspo import parallel
from megatron_gspo.training.agreement import on_any_rank, on_main_rank
from megatron_gspo.training.assembly import Run
from megatron_gspo.training.checkpoint import (
    RANDOM,
    STATE,
    SavedState,
    logger,
    own_storages,
    random_states,
    sharded_state,
)
from megatron_gspo.training.checkpoint_store import CheckpointStore, file_names, hash_files
from megatron_gspo.training.checkpoint_writer import Writer, addresses, give_own_storages, held_here, prepare_writer
from megatron_gspo.training.guards import SkippedUpdates
from megatron_gspo.training.main_rank_files import TORCH_COULD_NOT_WRITE, heard_by_all_ranks
from megatron_gspo.types import TrainingFailedError, UserError


class SaveFailedError(TrainingFailedError):
    """A checkpoint could not be written. Those before it are as they were."""

    of_all_ranks = True


@dataclass(frozen=True)
class _Save:
    """A save that is under way."""

    state: SavedState
    aside: Path
    request: AsyncRequest
    writer: Writer


class CheckpointSaver:
    """Saves checkpoints of one run; at most one is under way. Every rank calls every method, in the same order.

    As a context manager it finishes what is under way also where the run fails, as long as all ranks fail alike.
    """

    def __init__(self, store: CheckpointStore, *, keep: int, in_background: bool) -> None:
        self._store, self._keep, self._in_background = store, keep, in_background
        self._under_way: _Save | None = None
        self._num_bytes = 0  # of the tensors of all ranks, in the newest save
        self._deletion: threading.Thread | None = None  # the main rank's

    def save(
        self, run: Run, step: int, skipped: SkippedUpdates, metrics: Mapping[str, Any], *, owes_evaluation: bool = False
    ) -> None:
        """Save the run as it is after `step`: until it is whole, or in the background until what to write is planned.

        In the background the run must call `wait_until_copied` before it changes what is saved.

        Raises:
            SaveFailedError: it, or the one before it, could not be written.
        """
        self.finish()
        with self._failing(step):
            state = SavedState.of(run, step, skipped, metrics, owes_evaluation=owes_evaluation)
            self._under_way = self._start(run, state)
        if not self._in_background:
            self.finish()

    def wait_until_copied(self) -> None:
        """Wait until the save under way, if there is one, reads nothing more of the run's own tensors."""
        if self._under_way is not None:
            self._under_way.writer.copied.wait()

    def wait_until_deleted(self) -> None:
        """Wait until what the newest checkpoint superseded is gone; this rank alone may call it."""
        if self._deletion is not None:
            self._deletion.join()

    def finish_if_written(self) -> None:
        """Make the save under way a checkpoint, if every rank has written its part.

        Raises:
            SaveFailedError: it could not be written.
        """
        if self._under_way is not None and not on_any_rank(self._under_way.writer.is_alive()):
            self.finish()

    def finish(self) -> None:
        """Wait for the save under way, if there is one, and make it a checkpoint.

        Raises:
            SaveFailedError: it could not be written.
        """
        save, self._under_way = self._under_way, None
        if save is None:
            return
        with self._failing(save.state.step):
            save.writer.join()
            hashes = _hashes_of_all_ranks(save.writer)
            with heard_by_all_ranks():
                for finalize in save.request.finalize_fns:
                    finalize()  # raises on all ranks what a disk refused any of them
            on_main_rank(lambda: self._complete(save, hashes))
        if parallel.is_main_rank():
            beside = " beside the run" if self._in_background else ""
            path = self._store.path(save.state.step)
            logger.info("step %d: saved %s, written%s in %.2f s", save.state.step, path, beside, save.writer.seconds)

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None or (isinstance(error, TrainingFailedError) and error.of_all_ranks):
                self.finish()
        finally:
            if self._under_way is not None:  # a thread that is inside torch when the interpreter ends brings it down
                self._under_way.writer.join()
            self.wait_until_deleted()

    def _start(self, run: Run, state: SavedState) -> _Save:
        prepare_writer()
        sharded = sharded_state(run.policy, is_loading=False)
        self._num_bytes = int(parallel.sum_over_all_ranks(torch.tensor(_bytes_written_here(sharded))))
        live = addresses(sharded, own_storages(run.policy)) if self._in_background else frozenset()
        give_own_storages(sharded)
        aside = on_main_rank(lambda: self._make_room(state.step))
        with heard_by_all_ranks():
            request = dist_checkpointing.save(sharded, str(aside), async_sharded_save=True)
        assert request is not None, "Megatron returns what is left to do"
        generators = parallel.gather_objects(random_states())
        on_main_rank(lambda: _write_own_files(aside, state, generators))
        writer = Writer(request, live)
        writer.start()
        return _Save(state, aside, request, writer)

    def _make_room(self, step: int) -> Path:
        """The directory to write into, after a look at what room there is."""
        self.wait_until_deleted()
        aside = self._store.start(step)
        if shutil.disk_usage(aside).free < self._num_bytes:
            raise OSError("there is no room for it")
        return aside

    def _complete(self, save: _Save, hashes: dict[str, str]) -> None:
        """Hash what the ranks' threads did not write, and make the directory a checkpoint."""
        rest = [name for name in file_names(save.aside) if name not in hashes]
        self._store.finish(save.state.step, save.aside, hashes | hash_files(save.aside, rest), keep=self._keep)
        self._deletion = threading.Thread(target=self._delete_leftovers, name="checkpoint deletion", daemon=True)
        self._deletion.start()

    def _delete_leftovers(self) -> None:
        """Delete what is out of sight, the files of a save that failed included: gigabytes take a file system a while."""
        try:
            self._store.remove_leftovers()
        except OSError as error:  # the next save tries again, and fails where it cannot
            logger.warning("what is left of older saves could not be deleted: %s", error)

    @contextmanager
    def _failing(self, step: int) -> Iterator[None]:
        """Turn what can go wrong with a disk into a `SaveFailedError`, and remove what was written."""
        try:
            yield
        except (OSError, UserError, CheckpointException, _WriterDiedError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not TORCH_COULD_NOT_WRITE.search(str(error)):
                raise
            words = self._failure(step, error)
            if parallel.is_main_rank():
                self.wait_until_deleted()
                self._delete_leftovers()
            raise SaveFailedError(words) from error

    def _failure(self, step: int, error: BaseException) -> str:
        older = self._store.steps()
        kept = f"the one of step {older[-1]} is untouched" if older else "there is none before it"
        what_next = "go on with --resume" if older else "start anew"
        directory = self._store.directory
        what = f"step {step}: the checkpoint could not be written to {directory}: {_reason(error)}"
        if isinstance(error, _WriterDiedError):
            return f"{what}; {kept}. {what_next.capitalize()} when that is mended"
        left = f", and {_in_words(shutil.disk_usage(directory).free)} are left there" if directory.is_dir() else ""
        return f"{what}; it takes {_in_words(self._num_bytes)}{left}; {kept}. Make room, then {what_next}"


def _write_own_files(aside: Path, state: SavedState, generators: list[dict[str, Any]]) -> None:
    """Write what is not Megatron's."""
    (aside / STATE).write_text(state.text())
    # By way of memory: torch's own writer of files says nothing of why it could not write.
    buffer = io.BytesIO()
    torch.save(generators, buffer)
    (aside / RANDOM).write_bytes(buffer.getvalue())


class _WriterDiedError(Exception):
    """A rank's thread met something else than what a disk refuses, such as the end of the host's memory."""


def _hashes_of_all_ranks(writer: Writer) -> dict[str, str]:
    """The digest of each file that the ranks' threads wrote.

    Raises:
        _WriterDiedError: on all ranks, where the thread of any ended early.
    """
    death = None if writer.error is None else f"{type(writer.error).__name__}: {writer.error}"
    parts: Sequence[tuple[dict[str, str], str | None]] = parallel.gather_objects((writer.hashes, death))
    if deaths := [words for _, words in parts if words is not None]:
        raise _WriterDiedError(deaths[0]) from writer.error
    return {name: digest for hashes, _ in parts for name, digest in hashes.items()}


def _bytes_written_here(sharded: dict[str, Any]) -> int:
    """Bytes of the tensors that this rank writes: each is written by the first rank that has it."""
    return sum(value.data.nbytes for value in held_here(sharded) if is_main_replica(value.replica_id))


def _reason(error: BaseException) -> str:
    """Why a save failed, in words of the operating system where it said something."""
    words = str(error)
    if isinstance(error, CheckpointException):
        # The main rank has what each rank met; the others know only that some rank met something.
        met = [str(failure) for failure, _ in error.failures.values()]
        words = met[0].removeprefix("Worker failure: ") if met else "a rank could not write its part"
    return "a file could not be written in full" if TORCH_COULD_NOT_WRITE.search(words) else words


def _in_words(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.2f} MiB"
