"""Builds what a run consists of, from its recipe.

In: a recipe, on ranks whose process groups stand. Out: a `Run`: data, the policy with its optimizer, the reference policy
where a KL penalty asks for one, and, on data leaders, the rollout engine with the reward.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from megatron_gspo import parallel
from megatron_gspo.config import Recipe, require_data_files
from megatron_gspo.data.prompts import PromptStream, open_prompts
from megatron_gspo.model.build import build_policy, read_hf_config
from megatron_gspo.model.hf_weights import has_weights, initialize_weights, load_hf_weights
from megatron_gspo.model.policy import PolicyModel
from megatron_gspo.policy_loss import WideClipRangeWarning, resolve_objective
from megatron_gspo.training.agreement import together
from megatron_gspo.training.collector import ExperienceCollector
from megatron_gspo.training.engines import open_rollouts
from megatron_gspo.training.hand_over import hand_over_weights, verify_weights
from megatron_gspo.training.optimizer import LearningRate, TrainablePolicy, build_trainable_policy
from megatron_gspo.training.rollouts import Rollouts, load_tokenizer
from megatron_gspo.training.routing import RoutingControl

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything a run holds on this rank."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptStream
    held_out: PromptStream | None
    policy: TrainablePolicy
    reference: list[PolicyModel] | None
    rollouts: Rollouts | None  # on data leaders
    collector: ExperienceCollector
    routing: RoutingControl | None  # None for a dense model

    def hand_over_weights(self) -> int:
        """Give the policy's weights to the rollout engines, and verify that where it is asked for. All ranks call this.

        Returns:
            Bytes of the weights.
        """
        self.collector.pause()
        num_bytes = hand_over_weights(self.policy.models, self.rollouts, self.policy.version)
        if self.recipe.rollout.verify_weights:
            verify_weights(self.policy.chunks, self.rollouts, self.recipe, self.tokenizer)
        return num_bytes

    def close(self) -> None:
        """Stop what runs beside the trainer."""
        self.collector.close()
        if self.rollouts is not None:
            self.rollouts.close()


@dataclass
class Inputs:
    """What a run reads."""

    tokenizer: PreTrainedTokenizerBase
    prompts: PromptStream
    held_out: PromptStream | None


def assemble(recipe: Recipe, servers: Path | None = None) -> Run:
    """Build a run; the rollout engine holds the policy's weights when this returns. Every rank calls this.

    `servers` is the directory of a job's SGLang servers (`rollout.serve`).

    Raises:
        UserError: the recipe asks for what this version does not have, or its model, data or reward cannot be used.
    """
    recipe = with_clip_range(recipe)
    inputs = together(lambda: open_inputs(recipe))
    rollouts = open_rollouts(recipe, inputs.tokenizer, servers)
    models = build_models(recipe)
    run = Run(
        recipe=recipe,
        tokenizer=inputs.tokenizer,
        prompts=inputs.prompts,
        held_out=inputs.held_out,
        policy=build_trainable_policy(models, recipe, reinforcement_learning_rate(recipe)),
        reference=frozen_copy(models, recipe) if recipe.objective.kl_coefficient > 0 else None,
        rollouts=rollouts,
        collector=ExperienceCollector(recipe, inputs.prompts, rollouts, inputs.tokenizer),
        routing=RoutingControl(models, recipe) if models[0].config.num_moe_experts is not None else None,
    )
    run.hand_over_weights()
    return run


def open_inputs(recipe: Recipe) -> Inputs:
    """Open the run's data and tokenizer. Needs no other rank.

    Raises:
        UserError: one of them cannot be used.
    """
    require_data_files(recipe)
    read_hf_config(recipe.model.path)
    tokenizer = load_tokenizer(recipe.model.path)
    max_prompt_tokens = recipe.rollout.max_prompt_tokens
    return Inputs(
        tokenizer=tokenizer,
        prompts=open_prompts(recipe.data.train, "train", recipe.data, tokenizer, max_prompt_tokens, recipe.seed),
        held_out=open_held_out(recipe, tokenizer),
    )


def with_clip_range(recipe: Recipe) -> Recipe:
    """The recipe with the clip range that will be used, where it leaves that to the objective. Says what looks wrong.

    Raises:
        UserError: there is no such objective, or the range is none.
    """
    objective = recipe.objective
    chosen = resolve_objective(objective.name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", WideClipRangeWarning)
        clip_range = chosen.clip_range(objective.clip_low, objective.clip_high, objective.dual_clip)
    # Said once, here: every micro-batch's loss would say it again.
    warnings.simplefilter("ignore", WideClipRangeWarning)
    said = [str(warning.message) for warning in caught]
    if chosen.unit == "response" and objective.aggregation != "sequence_mean":
        said.append(
            f"objective.aggregation {objective.aggregation} weights {chosen.name}'s responses by their length, which the "
            "paper's objective (eq. 6) does not; sequence_mean is the paper's"
        )
    for sentence in said if parallel.is_main_rank() else []:
        logger.warning("%s", sentence)
    resolved = objective.model_copy(update={"clip_low": clip_range.low, "clip_high": clip_range.high})
    return recipe.model_copy(update={"objective": resolved})


def open_held_out(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PromptStream | None:
    """The evaluation's problems, where the recipe names any."""
    data = recipe.data
    if data.eval is None:
        return None
    return open_prompts(data.eval, "eval", data, tokenizer, recipe.rollout.max_prompt_tokens, recipe.seed)


def build_models(recipe: Recipe, *, load_balance_coefficient: float = 0.0) -> list[PolicyModel]:
    """The policy's chunks on this rank, with the checkpoint's weights, or random ones where it has none."""
    path = recipe.model.path
    hf_config = read_hf_config(path)
    models = build_policy(hf_config, recipe.model, recipe.parallel, load_balance_coefficient=load_balance_coefficient)
    if has_weights(path):
        load_hf_weights(models, path)
    else:
        if parallel.is_main_rank():
            logger.warning("%s holds no weights, only a configuration: the policy starts from random ones", path)
        initialize_weights(models, seed=recipe.seed, initializer_range=hf_config.initializer_range)
    return models


def reinforcement_learning_rate(recipe: Recipe) -> LearningRate:
    """The schedule of the recipe's `training` section."""
    training = recipe.training
    return LearningRate(
        peak=training.learning_rate,
        minimum=training.min_learning_rate,
        warmup_updates=training.warmup_updates,
        total_updates=training.steps * training.mini_batches,
        shape=training.learning_rate_schedule,
    )


def frozen_copy(models: list[PolicyModel], recipe: Recipe) -> list[PolicyModel]:
    """The same policy once more, without gradients: the reference of a KL penalty."""
    copies = build_policy(recipe.model.path, recipe.model, recipe.parallel)
    with torch.no_grad():
        for copy, model in zip(copies, models, strict=True):
            for to_parameter, from_parameter in zip(copy.parameters(), model.parameters(), strict=True):
                to_parameter.copy_(from_parameter)
                to_parameter.requires_grad_(False)
    return copies
