"""What the ranks of a test do: learn from responses that are the same in every parallel layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_gspo import parallel
from megatron_gspo.config import Recipe, load_recipe
from megatron_gspo.model.hf_weights import export_hf_weights
from megatron_gspo.policy_loss import group_advantages
from megatron_gspo.training.assembly import assemble, build_models, reinforcement_learning_rate
from megatron_gspo.training.experience import Experience, pack_samples, prompt_shares
from megatron_gspo.training.guards import SkippedUpdates
from megatron_gspo.training.loop import learn
from megatron_gspo.training.optimizer import build_trainable_policy
from megatron_gspo.training.warmstart import supervised_step
from megatron_gspo.types import Group, Prompt, Response

UNTIMED = ("time/", "throughput/", "memory/")


def fresh_world(meeting_point: str) -> None:
    """Meet the same ranks anew, at a file of that name, with none of the former process groups left."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    parallel.shutdown()
    dist.init_process_group("gloo", store=dist.FileStore(meeting_point, world_size), rank=rank, world_size=world_size)


def learn_arms_on_ranks(recipe: str, layout: list[str], arms: dict[str, list[str]], num_steps: int) -> dict:
    """Each arm's `learn`, in one layout."""
    parallel.initialize_distributed()
    return {name: learn_from_fixed(recipe, [*layout, *options], num_steps) for name, options in arms.items()}


def supervise_on_ranks(recipe: str, layout: list[str]) -> dict[str, float]:
    """One supervised update towards the fixed responses: its loss and gradient norm."""
    loaded = load_recipe(Path(recipe), layout)
    parallel.initialize_model_parallel(loaded.parallel, loaded.seed)
    policy = build_trainable_policy(
        build_models(loaded), loaded, reinforcement_learning_rate(loaded), divide_by_tokens=True
    )
    samples = fixed_experience(loaded, 1).samples[0]
    return supervised_step(policy, pack_samples(samples, loaded, 0), SkippedUpdates(0), step=1)


def learn_from_fixed(recipe: str, overrides: list[str], num_steps: int) -> dict:
    """Learn `num_steps` times from fixed responses; returns each step's metrics and the weights at the end."""
    loaded = load_recipe(Path(recipe), overrides)
    parallel.initialize_model_parallel(loaded.parallel, loaded.seed)
    run = assemble(loaded)
    skipped = SkippedUpdates(0)
    steps = []
    for step in range(1, num_steps + 1):
        result = learn(run, fixed_experience(loaded, step), step, skipped)
        steps.append({name: value for name, value in result.metrics.items() if not name.startswith(UNTIMED)})
    weights = torch.cat([tensor.reshape(-1).clone() for _, tensor in export_hf_weights(run.policy.models)])
    run.close()
    return {"steps": steps, "weights": weights}


def fixed_experience(recipe: Recipe, step: int) -> Experience:
    """This data-parallel rank's share of responses that the step's number alone decides."""
    shares, first_sample = prompt_shares(recipe.training.prompts_per_step, recipe)
    return Experience.of(
        [[_group(recipe, step, position) for position in share] for share in shares],
        first_sample,
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
