"""Checkpoints that a run goes on from, in any parallel layout.

In: a run after a step. Out: in `RUN/checkpoints/step_N` Megatron's distributed checkpoint of model and optimizer, and

    state.json   step, policy version, learning-rate schedule, skipped updates, data cursor, metrics line, recipe, model
    random.pt    the states of every rank's random generators
    manifest.json  the sha256 of all other files

and back: the same run, bit for bit where the layout is the same too. Megatron keeps its index in Python's pickle format:
go on from checkpoints of your own, and hand policies to others as Hugging Face checkpoints.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from torch.distributed.checkpoint.api import CheckpointException

from megatron_gspo import parallel
from megatron_gspo.model.policy import PolicyModel
from megatron_gspo.platform import detect_machine, prepare_checkpoint_writer
from megatron_gspo.training.agreement import on_main_rank
from megatron_gspo.training.assembly import Run
from megatron_gspo.training.checkpoint_store import CheckpointStore, file_names, hash_files
from megatron_gspo.training.guards import SkippedUpdates
from megatron_gspo.training.identity import model_identity
from megatron_gspo.training.optimizer import TrainablePolicy
from megatron_gspo.types import TrainingFailedError, UserError

logger = logging.getLogger(__name__)

FORMAT = 1
STATE, RANDOM = "state.json", "random.pt"

#: Every tensor of the optimizer is saved in its parameter's shape, so that any layout can load it; gathered in host
#: memory, a parameter buffer at a time, on the first of the ranks that share it. Names alike with and without experts.
_LAYOUT_FREE = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}


class SaveFailedError(TrainingFailedError):
    """A checkpoint could not be written. Those before it are as they were."""

    of_all_ranks = True


@dataclass(frozen=True)
class SavedState:
    """What `state.json` says: where the run was."""

    step: int
    policy_version: int
    num_updates: int  # of the learning-rate schedule
    skipped_total: int
    skipped_in_a_row: int
    prompts: Mapping[str, Any]  # the data cursor
    metrics: Mapping[str, Any]  # the step's line of metrics.jsonl
    recipe: Mapping[str, Any]
    model: Mapping[str, Any]  # what identifies it and its vocabulary
    world_size: int

    @classmethod
    def read(cls, checkpoint: Path) -> SavedState:
        """The state in a checkpoint whose files were verified.

        Raises:
            UserError: another version of this program wrote it, in another format.
        """
        saved = json.loads((checkpoint / STATE).read_text())
        if saved.pop("format") != FORMAT:
            raise UserError(f"{checkpoint} was written by another version of megatron_gspo, in a format not read here")
        return cls(**saved)


def save_checkpoint(
    run: Run, store: CheckpointStore, step: int, skipped: SkippedUpdates, metrics: Mapping[str, Any]
) -> None:
    """Write the checkpoint of `step`. Every rank takes part.

    Raises:
        SaveFailedError: it could not be written.
    """
    state = SavedState(
        step=step,
        policy_version=run.policy.version,
        num_updates=run.policy.scheduler.num_steps,
        skipped_total=skipped.total,
        skipped_in_a_row=skipped.in_a_row,
        prompts=run.prompts.state(),
        metrics=metrics,
        recipe=run.recipe.model_dump(mode="json"),
        model=model_identity(run.recipe.model.path, run.tokenizer),
        world_size=torch.distributed.get_world_size(),
    )
    try:
        _write(run.policy, store, state, keep=run.recipe.training.keep_checkpoints)
    except (OSError, UserError, CheckpointException) as error:
        older = store.steps()
        kept = f"the one of step {older[-1]} is untouched" if older else "there is none before it"
        raise SaveFailedError(
            f"step {step}: the checkpoint could not be written to {store.directory}: {_reason(error)}; {kept}. "
            "Make room, then go on with --resume"
        ) from error


def load_checkpoint(run: Run, checkpoint: Path, state: SavedState, skipped: SkippedUpdates) -> None:
    """Put `run` where the verified `checkpoint` was taken. Every rank takes part."""
    policy = run.policy
    with torch.no_grad():
        loaded = dist_checkpointing.load(_sharded_state(policy, is_loading=True), str(checkpoint))
        for name, model in _named_models(policy).items():
            model.load_state_dict(loaded[name])
        policy.optimizer.load_state_dict(loaded["optimizer"])
    policy.scheduler.num_steps = state.num_updates
    policy.scheduler.step(0)  # sets the rate
    policy.version = state.policy_version
    skipped.total, skipped.in_a_row = state.skipped_total, state.skipped_in_a_row
    run.prompts.load_state(state.prompts)
    if state.recipe["parallel"] == run.recipe.parallel.model_dump(mode="json"):
        states = torch.load(checkpoint / RANDOM, weights_only=True)
        _set_random_states(states[torch.distributed.get_rank()])
    elif parallel.is_main_rank():
        logger.info("the parallel layout differs from the checkpoint's: random generators start from the seed again")


def _write(policy: TrainablePolicy, store: CheckpointStore, state: SavedState, *, keep: int) -> None:
    prepare_checkpoint_writer()
    sharded = _sharded_state(policy, is_loading=False)
    num_bytes = int(parallel.sum_over_all_ranks(torch.tensor(_bytes_written_here(sharded))))
    aside = on_main_rank(lambda: _start(store, state.step, num_bytes))
    try:
        dist_checkpointing.save(sharded, str(aside))
        random_states = parallel.gather_objects(_random_states())
        names = on_main_rank(lambda: _write_own_files(aside, state, random_states))
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        parts = parallel.gather_objects(hash_files(aside, names[rank::world_size]))
        hashes = {name: digest for part in parts for name, digest in part.items()}
        on_main_rank(lambda: store.finish(state.step, aside, hashes, keep=keep))
    except (OSError, UserError, CheckpointException):
        if parallel.is_main_rank():
            store.abandon(aside)
        raise


def _start(store: CheckpointStore, step: int, num_bytes: int) -> Path:
    """The directory to write into, after a look at what room there is."""
    aside = store.start(step)
    free = shutil.disk_usage(aside).free
    if free < num_bytes:
        store.abandon(aside)
        raise OSError(f"it takes {num_bytes / 2**30:.3f} GiB and the disk has {free / 2**30:.3f} GiB left")
    return aside


def _write_own_files(aside: Path, state: SavedState, random_states: list[dict[str, Any]]) -> list[str]:
    """Write what is not Megatron's; returns the names of all files."""
    torch.save(random_states, aside / RANDOM)
    (aside / STATE).write_text(json.dumps({"format": FORMAT, **vars(state)}, indent=2) + "\n")
    return file_names(aside)


def _reason(error: BaseException) -> str:
    """Why a save failed, in words of the operating system where it said something."""
    if isinstance(error, CheckpointException):
        # The main rank has what each rank met; the others know only that some rank met something.
        met = [failure for failure, _ in error.failures.values()]
        return str(met[0].__cause__ or met[0]) if met else "a rank could not write its part"
    return str(error)


def _named_models(policy: TrainablePolicy) -> dict[str, PolicyModel]:
    """The chunks under the names that Megatron's optimizers look for."""
    models = policy.models
    return {"model": models[0]} if len(models) == 1 else {f"model{index}": model for index, model in enumerate(models)}


def _sharded_state(policy: TrainablePolicy, *, is_loading: bool) -> dict[str, Any]:
    """What of the policy is saved, as Megatron describes it: which part of which tensor this rank has."""
    models: dict[str, Any] = {
        name: model.sharded_state_dict(metadata=_LAYOUT_FREE) for name, model in _named_models(policy).items()
    }
    if not is_loading:
        for optimizer in policy.optimizer.chained_optimizers:
            # Moments exist from the first update on, and every update so far may have been skipped.
            optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
    with torch.no_grad():
        optimizer_state = policy.optimizer.sharded_state_dict(models, is_loading=is_loading, metadata=_LAYOUT_FREE)
    return models | {"optimizer": optimizer_state}


def _bytes_written_here(sharded: dict[str, Any]) -> int:
    """Bytes of the tensors that this rank writes: each is written by the first rank that has it."""
    held = (value for value in nested_values(sharded) if isinstance(value, ShardedTensor | ShardedTensorFactory))
    return sum(value.data.nbytes for value in held if is_main_replica(value.replica_id))


def _random_states() -> dict[str, Any]:
    """The states of this rank's random generators, as tensors, numbers and tuples."""
    # The legacy generator is of interest because libraries may draw from it; this project does not.
    legacy = np.random.get_state()  # noqa: NPY002
    name, keys, position, has_gauss, cached = cast(tuple[str, np.ndarray, int, int, float], legacy)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if detect_machine().has_cuda else None,
        "megatron": dict(tensor_parallel.get_cuda_rng_tracker().get_states()),
    }


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if detect_machine().has_cuda:
        torch.cuda.set_rng_state(states["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["megatron"])
