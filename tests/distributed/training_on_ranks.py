"""What the ranks of a test do: learn from responses that are the same in every parallel layout."""

from __future__ import annotations

import functools
import gc
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig

from megatron_gspo import parallel
from megatron_gspo.config import Recipe, load_recipe
from megatron_gspo.model.hf_weights import export_hf_weights
from megatron_gspo.policy_loss import group_advantages
from megatron_gspo.training import optimizer
from megatron_gspo.training.assembly import assemble, build_models, reinforcement_learning_rate
from megatron_gspo.training.experience import Experience, pack_samples
from megatron_gspo.training.guards import SkippedUpdates
from megatron_gspo.training.loop import learn
from megatron_gspo.training.optimizer import TrainablePolicy, build_trainable_policy
from megatron_gspo.training.warmstart import supervised_step
from megatron_gspo.types import Group, Prompt, Response
from tests.distributed.model_on_ranks import exported_gradients

#: Parameters a bucket of gradients holds at least, so that the tiny model has several.
BUCKET_SIZE = 4000
UNTIMED = ("time/", "throughput/", "memory/")


def fresh_world(meeting_point: str) -> None:
    """Meet the same ranks anew, at a file of that name, with none of the former process groups left."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    parallel.shutdown()
    dist.init_process_group("gloo", store=dist.FileStore(meeting_point, world_size), rank=rank, world_size=world_size)


def learn_layouts_on_ranks(
    recipe: str, layouts: dict[str, tuple[list[str], dict[str, list[str]]]], directory: str
) -> dict[str, dict[str, Any]]:
    """A step of each arm of each layout, by layout and arm, from the options of both; a layout may overrule an arm."""
    optimizer.DistributedDataParallelConfig = functools.partial(DistributedDataParallelConfig, bucket_size=BUCKET_SIZE)
    found = {}
    for number, (name, (layout, arms)) in enumerate(layouts.items()):
        fresh_world(f"{directory}/world_of_{dist.get_world_size()}_{number}")
        arrange(load_recipe(Path(recipe), layout))
        found[name] = {
            arm: learn_from_fixed(load_recipe(Path(recipe), [*options, *layout])) for arm, options in arms.items()
        }
    return found


def supervise_on_ranks(recipe: str, layout: list[str]) -> dict[str, float]:
    """One supervised update towards the fixed responses: its loss and gradient norm."""
    loaded = load_recipe(Path(recipe), layout)
    arrange(loaded)
    policy = build_trainable_policy(
        build_models(loaded), loaded, reinforcement_learning_rate(loaded), divide_by_tokens=True
    )
    samples = fixed_experience(loaded, 1).samples[0]
    return supervised_step(policy, pack_samples(samples, loaded, 0), SkippedUpdates(0), step=1)


def arrange(recipe: Recipe) -> None:
    """Arrange the ranks as `recipe` says."""
    parallel.initialize_model_parallel(recipe.parallel, recipe.seed)
    gc.freeze()  # what tests have imported is much, and stays


def learn_from_fixed(loaded: Recipe) -> dict[str, Any]:
    """Learn once from fixed responses; the step's metrics, the first update's gradients, and the weights at the end."""
    run = assemble(loaded)
    gradients: dict[str, torch.Tensor] = {}
    if not loaded.parallel.distributed_optimizer:  # with it a rank has the sum of its shard alone
        keep_first_gradients(run.policy, gradients)
    result = learn(run, fixed_experience(loaded, 1), 1, SkippedUpdates(0))
    metrics = {name: value for name, value in result.metrics.items() if not name.startswith(UNTIMED)}
    weights = torch.cat([tensor.reshape(-1).clone() for _, tensor in export_hf_weights(run.policy.models)])
    run.close()
    return {"metrics": metrics, "gradients": gradients, "weights": weights}


def keep_first_gradients(policy: TrainablePolicy, gradients: dict[str, torch.Tensor]) -> None:
    """Have the next update fill `gradients`, by Hugging Face name, with what the optimizer is given."""
    take_step = policy.optimizer.step

    def step() -> Any:
        policy.optimizer.step = take_step
        gradients.update(exported_gradients(policy.chunks))
        return take_step()

    policy.optimizer.step = step


def fixed_experience(recipe: Recipe, step: int) -> Experience:
    """This data-parallel rank's share of responses that the step's number alone decides."""
    own = range(recipe.training.prompts_per_step)[parallel.data_rank() :: parallel.data_size()]
    return Experience.of(
        {place: _group(recipe, step, place) for place in own},
        recipe,
        version=0,
        num_failed_rewards=0,
        rollout_s=1.0,
        reward_s=0.0,
    )


def _group(recipe: Recipe, step: int, position: int) -> Group:
    rng = np.random.default_rng([step, position])
    prompt = Prompt(f"p{position}", tuple(rng.integers(0, 256, rng.integers(3, 9)).tolist()), "", "")
    rewards = rng.integers(0, 2, recipe.rollout.responses_per_prompt).astype(np.float32)
    responses = tuple(_response(rng, prompt) for _ in rewards)
    return Group(prompt, responses, rewards, group_advantages(rewards))


def _response(rng: np.random.Generator, prompt: Prompt) -> Response:
    length = int(rng.integers(2, 20))
    # The rollout engine's routes: 2 of 4 experts in each of 4 MoE layers.
    routed = rng.permuted(np.tile(np.arange(4), (len(prompt.token_ids) + length - 1, 4, 1)), axis=-1)[..., :2]
    return Response(
        prompt.id,
        rng.integers(0, 256, length),
        np.full(length, -5.5, dtype=np.float32),
        "stop",
        weight_version=0,
        routed_experts=routed.astype(np.uint8),
    )
