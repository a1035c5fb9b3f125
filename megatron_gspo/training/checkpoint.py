"""What a checkpoint that a run goes on from holds, and going on from it, in any parallel layout.

In `RUN/checkpoints/step_N` lie Megatron's distributed checkpoint of model and optimizer, and

    state.json   step, policy version, learning-rate schedule, skipped updates, data cursor, metrics line, recipe, model
    random.pt    the states of every rank's random generators
    manifest.json  the digests of all other files

`checkpoint_saver.py` writes it. In: its directory. Out: the same run, bit for bit where the layout is the same too.
Megatron keeps its index in Python's pickle format: go on from checkpoints of your own, and hand policies to others as
Hugging Face checkpoints.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from megatron.core import dist_checkpointing, tensor_parallel

from megatron_gspo import parallel
from megatron_gspo.model.policy import PolicyModel
from megatron_gspo.platform import detect_machine
from megatron_gspo.training.assembly import Run
from megatron_gspo.training.checkpoint_reader import read_in_place
from megatron_gspo.training.guards import SkippedUpdates
from megatron_gspo.training.identity import model_identity
from megatron_gspo.training.optimizer import TrainablePolicy
from megatron_gspo.training.optimizer_state import without_gathering
from megatron_gspo.types import UserError

logger = logging.getLogger(__name__)

FORMAT = 1
STATE, RANDOM = "state.json", "random.pt"

#: What decides which part of the run a rank is, and so whether its random generators can go on.
_LAYOUT = ("tensor", "expert", "expert_tensor", "pipeline", "virtual_pipeline", "context", "data")


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
    owes_evaluation: bool = False  # the step's evaluation is still to be made, and its line of metrics to be recorded

    @classmethod
    def of(
        cls, run: Run, step: int, skipped: SkippedUpdates, metrics: Mapping[str, Any], *, owes_evaluation: bool = False
    ) -> SavedState:
        """Where `run` is after `step`, whose line of metrics is `metrics`."""
        return cls(
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
            owes_evaluation=owes_evaluation,
        )

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

    def text(self) -> str:
        """What `read` reads."""
        return json.dumps({"format": FORMAT, **vars(self)}, indent=2) + "\n"


def load_checkpoint(run: Run, checkpoint: Path, state: SavedState, skipped: SkippedUpdates) -> None:
    """Put `run` where the verified `checkpoint` was taken. Every rank takes part."""
    policy = run.policy
    with torch.no_grad():
        with read_in_place():
            loaded = dist_checkpointing.load(sharded_state(policy, is_loading=True), str(checkpoint))
        for name, model in _named_models(policy).items():
            model.load_state_dict(loaded[name])
        policy.optimizer.load_state_dict(loaded["optimizer"])
    policy.scheduler.num_steps = state.num_updates
    policy.scheduler.step(0)  # sets the rate
    policy.version = state.policy_version
    skipped.total, skipped.in_a_row = state.skipped_total, state.skipped_in_a_row
    run.prompts.load_state(state.prompts)
    layout = run.recipe.parallel.model_dump(mode="json")
    if all(state.recipe["parallel"][name] == layout[name] for name in _LAYOUT):
        states = torch.load(checkpoint / RANDOM, weights_only=True)
        _set_random_states(states[torch.distributed.get_rank()])
    elif parallel.is_main_rank():
        logger.info("the parallel layout differs from the checkpoint's: random generators start from the seed again")


def _named_models(policy: TrainablePolicy) -> dict[str, PolicyModel]:
    """The chunks under the names that Megatron's optimizers look for."""
    models = policy.models
    return {"model": models[0]} if len(models) == 1 else {f"model{index}": model for index, model in enumerate(models)}


def sharded_state(policy: TrainablePolicy, *, is_loading: bool) -> dict[str, Any]:
    """What of the policy is saved, as Megatron describes it: which part of which tensor this rank has."""
    # Every tensor of the optimizer is saved in its parameter's shape, so that any layout can load it; gathered in host
    # memory, a parameter buffer at a time, on the first of the ranks that share it. Names alike with and without experts.
    # Made anew each time: Megatron adds the process groups of the day to it (ensure_metadata_has_dp_cp_group).
    layout_free = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "chained_optim_avoid_prefix": True,
    }
    models: dict[str, Any] = {
        name: model.sharded_state_dict(metadata=layout_free) for name, model in _named_models(policy).items()
    }
    for optimizer in policy.optimizer.chained_optimizers:
        # Moments exist from the first update on, and every update so far may have been skipped.
        optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
    with torch.no_grad(), without_gathering(policy.optimizer.chained_optimizers):
        optimizer_state = policy.optimizer.sharded_state_dict(models, is_loading=is_loading, metadata=layout_free)
    return models | {"optimizer": optimizer_state}


def own_storages(policy: TrainablePolicy) -> frozenset[int]:
    """Where the storages begin that updates change: of the models' weights and of what the optimizers hold.

    What else is in `sharded_state` was gathered from other ranks for it.
    """
    tensors = [tensor for model in policy.models for tensor in (*model.parameters(), *model.buffers())]
    for optimizer in policy.optimizer.chained_optimizers:
        tensors += [parameter for group in optimizer.optimizer.param_groups for parameter in group["params"]]
        for state in optimizer.optimizer.state.values():
            tensors += [value for value in state.values() if torch.is_tensor(value)]
    return frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors)


def random_states() -> dict[str, Any]:
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
