"""What the ranks of checkpoint tests do: learn from fixed responses, save, load, and meet what disks and signals do."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core import dist_checkpointing

from megatron_gspo.config import load_recipe
from megatron_gspo.model.hf_weights import export_hf_weights
from megatron_gspo.training.assembly import Run, assemble
from megatron_gspo.training.checkpoint import load_checkpoint
from megatron_gspo.training.checkpoint_saver import CheckpointSaver, SaveFailedError
from megatron_gspo.training.checkpoint_store import CheckpointStore
from megatron_gspo.training.checkpoint_writer import Writer
from megatron_gspo.training.guards import SkippedUpdates
from megatron_gspo.training.loop import learn
from megatron_gspo.training.resume import find_checkpoint
from tests.distributed.training_on_ranks import arrange, fixed_experience

#: Audit events of changes to the file system that `open` for writing does not raise.
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")


def save_and_go_on(recipe: str, options: list[str], own: str | None, saved: str | None) -> dict[str, dict[str, Any]]:
    """What a layout's ranks do, both in one start: learn a step, save it in the directory `own`, and learn another; and
    go on from what another layout has saved in the directory `saved`, save that again beside it, and learn the other step.
    """
    loaded = load_recipe(Path(recipe), options)
    arrange(loaded)
    states = {}
    if own is not None:
        run = assemble(loaded)
        learn(run, fixed_experience(run.recipe, 1), 1, SkippedUpdates(0))
        states["own"] = save_and_learn(run, CheckpointStore(Path(own)))
    if saved is not None:
        run = assemble(loaded)
        checkpoint = find_checkpoint(CheckpointStore(Path(saved)), run.recipe, None)
        load_checkpoint(run, checkpoint.path, checkpoint.state, SkippedUpdates(0))
        states["gone on"] = save_and_learn(run, CheckpointStore(Path(f"{saved}, gone on")))
    return states


def assembled(recipe: str, options: list[str]) -> Run:
    loaded = load_recipe(Path(recipe), options)
    arrange(loaded)
    return assemble(loaded)


def save(run: Run, store: CheckpointStore, step: int, *, keep: int = 2) -> None:
    """Save `run` as it is, as `step`, and wait."""
    with CheckpointSaver(store, keep=keep, in_background=True) as saver:
        saver.save(run, step, SkippedUpdates(0), {"step": step})


def save_and_learn(run: Run, store: CheckpointStore) -> dict[str, Any]:
    save(run, store, 1)
    tensors = dist_checkpointing.load_plain_tensors(str(store.path(1)))
    state = {
        "weights": weights_of(run),
        "moments": {name: tensor for name, tensor in tensors.items() if name.startswith("optimizer.")},
    }
    learn(run, fixed_experience(run.recipe, 2), 2, SkippedUpdates(0))
    state["weights_after"] = weights_of(run)
    run.close()
    return state


def weights_of(run: Run) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1).clone() for _, tensor in export_hf_weights(run.policy.models)])


def save_beside_the_run(recipe: str, options: list[str], directory: str) -> dict[str, Any]:
    """Learn a step and save it waiting, then in the background, held back until another step was learnt."""
    run = assembled(recipe, options)
    learn(run, fixed_experience(run.recipe, 1), 1, SkippedUpdates(0))
    waited, beside = (CheckpointStore(Path(directory) / name) for name in ("waited", "beside"))
    CheckpointSaver(waited, keep=2, in_background=False).save(run, 1, SkippedUpdates(0), {"step": 1})
    before = weights_of(run)
    with CheckpointSaver(beside, keep=2, in_background=True) as saver:
        with writers_held_back():
            saver.save(run, 1, SkippedUpdates(0), {"step": 1})
            saver.wait_until_copied()
            learn(run, fixed_experience(run.recipe, 2), 2, SkippedUpdates(0))
            saver.finish_if_written()
            steps_while_held = beside.steps()
        # The next save waits for the one under way.
        saver.save(run, 2, SkippedUpdates(0), {"step": 2})
        steps_at_next_save = beside.steps()
    moved = (weights_of(run) - before).abs().max()
    return {"while held": steps_while_held, "at next save": steps_at_next_save, "moved": moved}


@contextlib.contextmanager
def writers_held_back() -> Iterator[None]:
    """Within it no thread but the main one opens a file for writing."""
    released = threading.Event()

    def hold(event: str, arguments: tuple[Any, ...]) -> None:
        if is_change(event, arguments) and threading.current_thread() is not threading.main_thread():
            released.wait()

    sys.addaudithook(hold)  # hooks stay; once released it lets everything pass
    yield
    released.set()


def fail_to_save(recipe: str, options: list[str], directory: str) -> dict[str, str]:
    """Save step 1; then step 2, of which a rank's disk refuses a file each time; then step 3. The refusals, by that file.

    Refused is what the last rank writes, and each file that Megatron writes on the first rank alone. At last, as "memory",
    the last rank cannot copy.
    """
    run = assembled(recipe, options)
    store = CheckpointStore(Path(directory))
    saver = CheckpointSaver(store, keep=2, in_background=True)
    saver.save(run, 1, SkippedUpdates(0), {"step": 1})
    saver.finish()
    world_size = torch.distributed.get_world_size()
    refusals = {}
    # torch opens common.pt unseen: it is the first file in the new directory.
    for file, rank, event in (
        (f"__{world_size - 1}_0.distcp", world_size - 1, "open"),
        ("common.pt", 0, "os.mkdir"),
        (".metadata", 0, "open"),
        ("metadata.json", 0, "open"),
    ):
        named = ".step_2.part" if event == "os.mkdir" else file
        with contextlib.ExitStack() as disk:
            if torch.distributed.get_rank() == rank:
                disk.enter_context(file_size_limited(event, named, 10))
            refusals[file] = refusal_of(lambda: (saver.save(run, 2, SkippedUpdates(0), {"step": 2}), saver.finish()))
        assert store.steps() == [1], "seen by every rank"
    with contextlib.ExitStack() as memory:
        if torch.distributed.get_rank() == world_size - 1:
            memory.enter_context(mock.patch.object(Writer, "_on_host", side_effect=MemoryError("no room for a copy")))
        refusals["memory"] = refusal_of(lambda: (saver.save(run, 2, SkippedUpdates(0), {"step": 2}), saver.finish()))
    saver.save(run, 3, SkippedUpdates(0), {"step": 3})
    saver.finish()
    return refusals


@contextlib.contextmanager
def file_size_limited(event: str, named: str, num_bytes: int) -> Iterator[None]:
    """From the change that raises `event` on a path with `named` in it, until the end: no file beyond `num_bytes`.

    Python ignores the signal that such a write raises, so the write fails; where that is undone it ends the process.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    is_over = False

    def limit(found: str, arguments: tuple[Any, ...]) -> None:
        if not is_over and found == event and is_change(found, arguments) and named in str(arguments[0]):
            resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))

    sys.addaudithook(limit)  # hooks stay
    yield
    is_over = True
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def save_onto(recipe: str, directory: str, free: list[int], spare: str) -> list[str]:
    """Save step 1, then try step 2 with each number of bytes left on the disk; what each try was refused with, or ""."""
    run = assembled(recipe, [])
    store = CheckpointStore(Path(directory) / "checkpoints")
    saver = CheckpointSaver(store, keep=2, in_background=True)
    saver.save(run, 1, SkippedUpdates(0), {"step": 1})
    saver.finish()
    shutil.copytree(store.path(1), spare)
    filling = Path(directory) / "filling"
    refusals = []
    for left in free:
        taken = shutil.disk_usage(directory).free - left
        filling.write_bytes(bytes(max(0, taken)))
        refusals.append(refusal_of(lambda: (saver.save(run, 2, SkippedUpdates(0), {"step": 2}), saver.finish())))
        filling.unlink()
    return refusals


def refusal_of(save: Callable[[], object]) -> str:
    try:
        save()
    except SaveFailedError as error:
        return str(error)
    return ""


def save_under_observation(recipe: str, directory: str) -> int:
    """Save steps 1 and 2, and copy what a kill would leave before every change to the file system in the second save.

    A process that is killed leaves its files as others see them at that moment: what is copied here.
    """
    run = assembled(recipe, [])
    store = CheckpointStore(Path(directory) / "saved")
    save(run, store, 1)
    num_changes = 0
    is_over = False
    copier: int | None = None  # the thread that copies, whose own changes do not count; others' wait
    one_at_a_time = threading.Lock()

    def copy(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal num_changes, copier
        if is_over or copier == threading.get_ident() or not is_change(event, arguments):
            return
        with one_at_a_time:
            copier = threading.get_ident()
            shutil.copytree(store.directory, Path(directory) / f"before_{num_changes}")
            num_changes += 1
            copier = None

    sys.addaudithook(copy)
    save(run, store, 2, keep=1)
    is_over = True
    return num_changes


def save_and_be_killed(
    recipe: str, options: list[str], directory: str, rank: int, event: str, named: str, after_bytes: int | None = None
) -> None:
    """Save steps 1 and 2; `rank` is killed in the second save where it raises `event` on a path that has `named` in it.

    With `after_bytes` it is killed in the middle of a write, when from there on a file has grown by as many.
    """
    run = assembled(recipe, options)
    store = CheckpointStore(Path(directory))
    save(run, store, 1)

    def kill_self(found: str, arguments: tuple[Any, ...]) -> None:
        if found == event and is_change(found, arguments) and named in str(arguments[0]):
            os.kill(os.getpid(), signal.SIGKILL)

    with contextlib.ExitStack() as disk:
        if torch.distributed.get_rank() == rank and after_bytes is None:
            sys.addaudithook(kill_self)
        elif torch.distributed.get_rank() == rank:
            # The kernel ends a process that writes on at the limit, at once: it cannot be caught any more.
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            disk.enter_context(file_size_limited(event, named, after_bytes or 0))
        save(run, store, 2)


def is_change(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether an audit event is of a change to the file system."""
    return event in CHANGES or (event == "open" and isinstance(arguments[1], str) and "w" in arguments[1])
