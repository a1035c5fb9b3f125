"""What the ranks of a test do: learn from responses that are the same in every parallel layout."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from megatron_gspo import parallel
from megatron_gspo.config import Recipe, load_recipe
from megatron_gspo.model.build import read_hf_config
from megatron_gspo.policy_loss import group_advantages
from megatron_gspo.training import optimizer
from megatron_gspo.training.assembly import (
    Run,
    assemble,
    build_models,
    reinforcement_learning_rate,
    with_clip_range,
)
from megatron_gspo.training.experience import Experience, pack_samples
from megatron_gspo.training.guards import SkippedUpdates
from megatron_gspo.training.loop import learn
from megatron_gspo.training.optimizer import TrainablePolicy, build_trainable_policy
from megatron_gspo.training.routing import RoutingControl
from megatron_gspo.training.warmstart import supervised_step
from megatron_gspo.types import Group, Prompt, Response
from tests.distributed.model_on_ranks import exported_gradients

#: Parameters a bucket of gradients holds at least, so that the tiny model has several.
BUCKET_SIZE = 4000
UNTIMED = ("time/", "throughput/", "memory/")


def learn_on_ranks(
    recipe: str, options: list[str], arms: dict[str, list[str]], num_equal: int
) -> dict[str, dict[str, Any]]:
    """One step of each arm in the layout that `options` describe; an arm's own options come before the layout's.

    `num_equal` groups of its responses have equal rewards.
    """
    optimizer.DistributedDataParallelConfig = functools.partial(DistributedDataParallelConfig, bucket_size=BUCKET_SIZE)
    layout = load_recipe(Path(recipe), options)
    arrange(layout)
    run = assemble(layout)
    # No switch of an arm decides what is learned from.
    experience = fixed_experience(layout, 1, num_equal)
    found = {
        arm: learn_from_fixed(run, experience, load_recipe(Path(recipe), [*of_arm, *options]))
        for arm, of_arm in arms.items()
    }
    run.close()
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


class WeightsHandedOver:
    """Stands where a data leader has its rollout engine, on every rank, and keeps the weights that one is given."""

    def __init__(self) -> None:
        self.engine = self
        self.weights = torch.empty(0)

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Keep all of them in one vector."""
        assert version == 1
        self.weights = torch.cat([tensor.reshape(-1).clone() for _, tensor in weights])


def learn_from_fixed(assembled: Run, experience: Experience, recipe: Recipe) -> dict[str, Any]:
    """Learn once from `experience`, with a policy of its own and `recipe`'s switches.

    Args:
        assembled: what stays the same for all that learn.
        experience: the same responses for all that learn.
        recipe: the arm's and the layout's.

    Returns:
        The step's metrics, the first update's gradients, and the weights that the rollout engine gets at the end.
    """
    recipe = with_clip_range(recipe)
    models = build_models(recipe)
    handed_over = WeightsHandedOver()
    run = replace(
        assembled,
        recipe=recipe,
        policy=build_trainable_policy(models, recipe, reinforcement_learning_rate(recipe)),
        rollouts=handed_over,  # the responses are there already
        routing=RoutingControl(models, recipe),
    )
    gradients: dict[str, torch.Tensor] = {}
    keep_first_gradients(run.policy, gradients)
    result = learn(run, experience, 1, SkippedUpdates(0))
    metrics = {name: value for name, value in result.metrics.items() if not name.startswith(UNTIMED)}
    return {"metrics": metrics, "gradients": gradients, "weights": handed_over.weights}


def keep_first_gradients(policy: TrainablePolicy, gradients: dict[str, torch.Tensor]) -> None:
    """Have the next update fill `gradients`, by Hugging Face name, with what the optimizer is given."""
    take_step = policy.optimizer.step

    def step() -> Any:
        policy.optimizer.step = take_step
        for chunk in policy.chunks:
            if chunk.ddp_config.use_distributed_optimizer:
                gather_gradients(chunk)
        gradients.update(exported_gradients(policy.chunks))
        return take_step()

    policy.optimizer.step = step


def gather_gradients(chunk: DistributedDataParallel) -> None:
    """Put the summed gradients, of which a rank of the distributed optimizer has its shard alone, together everywhere."""
    for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
        for bucket in group.buckets:
            shards = bucket.grad_data.chunk(group.intra_distributed_optimizer_instance_size)
            own = shards[group.intra_distributed_optimizer_instance_rank].clone()
            dist.all_gather_into_tensor(bucket.grad_data, own, group=group.intra_distributed_optimizer_instance_group)


def fixed_experience(recipe: Recipe, step: int, num_equal: int = 0) -> Experience:
    """This data-parallel rank's share of responses that the step's number decides; the first groups' rewards are equal."""
    own = range(recipe.training.prompts_per_step)[parallel.data_rank() :: parallel.data_size()]
    num_layers = read_hf_config(recipe.model.path).num_hidden_layers
    return Experience.of(
        {place: _group(recipe, step, place, num_layers, equal=place < num_equal) for place in own},
        recipe,
        version=0,
        num_failed_rewards=0,
        rollout_s=1.0,
        reward_s=0.0,
    )


def _group(recipe: Recipe, step: int, position: int, num_layers: int, *, equal: bool) -> Group:
    rng = np.random.default_rng([step, position])
    prompt = Prompt(f"p{position}", tuple(rng.integers(0, 256, rng.integers(3, 9)).tolist()), "", "")
    one_in_two = np.arange(recipe.rollout.responses_per_prompt, dtype=np.float32) % 2
    rewards = np.ones_like(one_in_two) if equal else rng.permutation(one_in_two)
    responses = tuple(
        _response(rng, prompt, int(rng.integers(2, recipe.rollout.max_response_tokens + 1)), num_layers)
        for _ in rewards
    )
    return Group(prompt, responses, rewards, group_advantages(rewards))


def _response(rng: np.random.Generator, prompt: Prompt, length: int, num_layers: int) -> Response:
    # The rollout engine's routes: 2 of 4 experts in each layer.
    all_experts = np.tile(np.arange(4), (len(prompt.token_ids) + length - 1, num_layers, 1))
    return Response(
        prompt.id,
        rng.integers(0, 256, length),
        np.full(length, -5.5, dtype=np.float32),
        "stop",
        weight_version=0,
        routed_experts=rng.permuted(all_experts, axis=-1)[..., :2].astype(np.uint8),
    )
