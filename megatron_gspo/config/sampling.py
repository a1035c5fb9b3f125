"""What must hold between the recipe's fields that say which responses a step learns from, and when they are sampled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_gspo.config.refusal import Refusal, not_accepted

if TYPE_CHECKING:
    from megatron_gspo.config.schema import Recipe


def check_sampling(recipe: Recipe) -> Iterator[Refusal]:
    """What is wrong with generation ahead, and with the shaping of rewards."""
    if recipe.rollout.one_step_ahead and recipe.rollout.engine == "local":
        yield not_accepted(
            "rollout.one_step_ahead",
            True,
            "false under rollout.engine: local, which samples in the trainer's process and cannot while that trains",
        )
    if recipe.environment.name is not None and recipe.rollout.close_at_fraction < 1:
        yield not_accepted(
            "rollout.close_at_fraction",
            recipe.rollout.close_at_fraction,
            f"1 under environment.name: {recipe.environment.name}, whose responses are sampled turn by turn to their end",
        )
    if recipe.environment.name is not None and recipe.rollout.one_step_ahead:
        yield not_accepted("rollout.one_step_ahead", True, f"false under environment.name: {recipe.environment.name}")
    if recipe.rollout.sglang.release_memory and recipe.rollout.one_step_ahead:
        yield not_accepted(
            "rollout.one_step_ahead",
            True,
            "false under rollout.sglang.release_memory: true, where servers have no memory while the policy is trained",
        )
    buffer, longest = recipe.reward.overlong_buffer_tokens, recipe.max_sampled_tokens
    if buffer > longest:
        yield not_accepted(
            "reward.overlong_buffer_tokens",
            buffer,
            f"at most the {longest} tokens of the longest response, so that there are lengths that cost nothing",
        )
