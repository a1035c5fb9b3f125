"""What the ranks of checkpoint tests do: learn from fixed responses, save, load."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

from megatron_gspo import parallel
from megatron_gspo.config import load_recipe
from megatron_gspo.model.hf_weights import export_hf_weights
from megatron_gspo.training.assembly import Run, assemble
from megatron_gspo.training.checkpoint import load_checkpoint, save_checkpoint
from megatron_gspo.training.checkpoint_store import CheckpointStore
from megatron_gspo.training.guards import SkippedUpdates
from megatron_gspo.training.loop import learn
from megatron_gspo.training.resume import find_checkpoint
from tests.distributed.training_on_ranks import fixed_experience


def learn_save_learn(recipe: str, layout: list[str], directory: str) -> dict[str, Any]:
    """Learn a step, save it, and learn another."""
    run = assembled(recipe, layout)
    learn(run, fixed_experience(run.recipe, 1), 1, SkippedUpdates(0))
    return save_and_learn(run, CheckpointStore(Path(directory) / "saved"))


def load_save_learn(recipe: str, layout: list[str], directory: str) -> dict[str, Any]:
    """Go on from what `learn_save_learn` saved; save that again, and learn the same other step."""
    run = assembled(recipe, layout)
    found = find_checkpoint(CheckpointStore(Path(directory) / "saved"), run.recipe, None)
    load_checkpoint(run, found.path, found.state, SkippedUpdates(0))
    return save_and_learn(run, CheckpointStore(Path(directory) / "loaded"))


def assembled(recipe: str, layout: list[str]) -> Run:
    loaded = load_recipe(Path(recipe), layout)
    parallel.initialize_model_parallel(loaded.parallel, loaded.seed)
    return assemble(loaded)


def save_and_learn(run: Run, store: CheckpointStore) -> dict[str, Any]:
    save_checkpoint(run, store, 1, SkippedUpdates(0), {"step": 1})
    tensors = dist_checkpointing.load_plain_tensors(str(store.path(1)))
    state = {
        "weights": weights_of(run),
        "moments": {name: tensor for name, tensor in tensors.items() if ".exp_avg" in name},
    }
    learn(run, fixed_experience(run.recipe, 2), 2, SkippedUpdates(0))
    state["weights_after"] = weights_of(run)
    run.close()
    return state


def weights_of(run: Run) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1).clone() for _, tensor in export_hf_weights(run.policy.models)])


def save_and_be_killed(recipe: str, directory: str, at_event: int) -> None:
    """Save steps 1 and 2, and be killed at the `at_event`th change to the file system in the second save."""
    run = assembled(recipe, [])
    store = CheckpointStore(Path(directory))
    save_checkpoint(run, store, 1, SkippedUpdates(0), {"step": 1})
    num_events = 0

    def kill_self(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal num_events
        is_write = event == "open" and isinstance(arguments[1], str) and "w" in arguments[1]
        if is_write or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            if num_events == at_event:
                os.kill(os.getpid(), signal.SIGKILL)
            num_events += 1

    sys.addaudithook(kill_self)
    save_checkpoint(run, store, 2, SkippedUpdates(0), {"step": 2})
    raise AssertionError(f"survived: a save makes {num_events} changes")
