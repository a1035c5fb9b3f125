"""Finding the checkpoint that a run goes on from, and what must be so before it does.

In: the run's checkpoints and the recipe. Out: the newest whole one (or the one asked for), every byte of it verified, or
a refusal that names what is wrong and the checkpoint that could be taken instead.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_gspo import parallel
from megatron_gspo.config import Recipe
from megatron_gspo.training.agreement import on_main_rank
from megatron_gspo.training.checkpoint import SavedState
from megatron_gspo.training.checkpoint_store import CheckpointStore, damaged_files
from megatron_gspo.training.identity import differences, model_identity, require_same_model, require_same_run
from megatron_gspo.training.rollouts import load_tokenizer
from megatron_gspo.types import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint whose files are what was written."""

    path: Path
    state: SavedState


def find_checkpoint(store: CheckpointStore, recipe: Recipe, from_step: int | None) -> FoundCheckpoint:
    """The checkpoint of `from_step`, or the newest, for a run of `recipe` (with its clip range) to go on from.

    Every rank takes part; each verifies a share of the files.

    Raises:
        UserError: there is none, a file of it is damaged, or it is of another model, vocabulary or recipe.
    """
    step = on_main_rank(lambda: _chosen_step(store, from_step))
    path = store.path(step)
    found = damaged_files(path, share=dist.get_rank(), num_shares=dist.get_world_size())
    damaged = [file for files in parallel.gather_objects(found) for file in files]
    return on_main_rank(lambda: _checked(store, step, damaged, recipe))


def _chosen_step(store: CheckpointStore, from_step: int | None) -> int:
    steps = store.steps()
    if not steps:
        raise UserError(f"--resume: {store.directory} holds no checkpoint; without --resume a run starts anew")
    if from_step is not None and from_step not in steps:
        raise UserError(f"--resume-from: there is no checkpoint of step {from_step}; accepted: {_listed(steps)}")
    if problem := store.pointer_problem():
        logger.warning("%s; the checkpoints themselves were looked at instead", problem)
    return steps[-1] if from_step is None else from_step


def _checked(store: CheckpointStore, step: int, damaged: list[Path], recipe: Recipe) -> FoundCheckpoint:
    path = store.path(step)
    if damaged:
        raise UserError(f"{damaged[0]} is damaged: it is not what was saved; {_alternative(store, step)}")
    state = SavedState.read(path)
    tokenizer = load_tokenizer(recipe.model.path)
    require_same_model(path, state.model, model_identity(recipe.model.path, tokenizer), recipe.model.path)
    require_same_run(path, state.recipe, recipe)
    logger.info("going on from %s, after step %d of %d", path, step, recipe.training.steps)
    if changed := differences(state.recipe, recipe):
        logger.info("what differs from then: %s", ", ".join(changed))
    return FoundCheckpoint(path, state)


def _alternative(store: CheckpointStore, step: int) -> str:
    """What to do where the checkpoint of `step` is damaged."""
    for older in reversed([saved for saved in store.steps() if saved < step]):
        if not damaged_files(store.path(older)):
            return f"the checkpoint of step {older} is whole: go on from it with --resume-from {older}"
    return "no checkpoint before it is whole: remove the run's directory and start anew"


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps))
