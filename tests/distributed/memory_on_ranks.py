"""What the ranks of test_memory.py do: build a policy as a run does, make an update, and weigh what is allocated."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_gspo import parallel
from megatron_gspo.config import load_recipe
from megatron_gspo.training.assembly import build_models, reinforcement_learning_rate
from megatron_gspo.training.optimizer import TrainablePolicy, build_trainable_policy


def allocated_under(recipe: str, variants: dict[str, list[str]]) -> dict[str, dict[str, int]]:
    """For each variant (overrides of the recipe) this rank's place in the layout and the bytes it holds."""
    return {name: _allocated(recipe, overrides) for name, overrides in variants.items()}


def _allocated(recipe: str, overrides: list[str]) -> dict[str, int]:
    loaded = load_recipe(Path(recipe), overrides)
    parallel.initialize_model_parallel(loaded.parallel, loaded.seed)
    policy = build_trainable_policy(build_models(loaded), loaded, reinforcement_learning_rate(loaded))
    # Adam makes its states in the first update, whatever the gradient.
    policy.clear_gradients()
    policy.optimizer.step()
    parameters = [parameter for model in policy.models for parameter in model.parameters()]
    held = {
        "parameters": _storages(parameters),
        "gradients": _storages(parameter.main_grad for parameter in parameters),
    }
    elsewhere = held["parameters"] | held["gradients"]
    states = _storages(_optimizer_tensors(policy))
    held["optimizer"] = {place: size for place, size in states.items() if place not in elsewhere}
    return {
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "dense data rank": parallel_state.get_data_parallel_rank(with_context_parallel=True),
        "expert data rank": parallel_state.get_expert_data_parallel_rank(),
        **{part: sum(storages.values()) for part, storages in held.items()},
    }


def _optimizer_tensors(policy: TrainablePolicy) -> Iterable[torch.Tensor]:
    """Adam's states, and what it updates: the parameters themselves, or float32 copies of them."""
    for optimizer in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
        for group in optimizer.optimizer.param_groups:
            yield from group["params"]
        for state in optimizer.optimizer.state.values():
            yield from (value for value in state.values() if torch.is_tensor(value))


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes by address, so that what shares memory counts once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}
