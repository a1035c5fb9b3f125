"""The policy with what changes it: Megatron's data-parallel wrapper, optimizer and learning-rate schedule.

In: the model's chunks (one a virtual pipeline stage) and the recipe. Out: a `TrainablePolicy`, whose gradients are sums
over micro-batches and data-parallel ranks. The losses carry the mini-batch's global denominators already, so nothing
divides the gradient again: that is Megatron's `calculate_per_token_loss` path without its division by a token count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_gspo.config import Recipe
from megatron_gspo.model.policy import PolicyModel
from megatron_gspo.training.adam import register_adam


@dataclass(frozen=True)
class LearningRate:
    """A learning-rate schedule in updates: linear over the warm-up, then constant or decaying to `minimum`."""

    peak: float
    minimum: float
    warmup_updates: int
    total_updates: int
    shape: str  # "constant", "linear" or "cosine"


@dataclass
class TrainablePolicy:
    """The policy being trained. `version` counts the hand-overs to the rollout engine: 0 is the weights it started from."""

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    version: int = 0

    @property
    def models(self) -> list[PolicyModel]:
        """The chunks without their data-parallel wrapper."""
        return [chunk.module for chunk in self.chunks]

    @property
    def learning_rate(self) -> float:
        """The rate of the next update."""
        return self.optimizer.param_groups[0]["lr"]

    def clear_gradients(self) -> None:
        """Make every gradient zero before a mini-batch's first backward pass."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def gather_parameters(self) -> None:
        """Make the models' parameters those of the last update, for whoever reads them without a forward pass.

        Under `parallel.overlap_parameter_gather` only the next forward pass would gather them. A collective.
        """
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)


def build_trainable_policy(
    models: Sequence[PolicyModel], recipe: Recipe, learning_rate: LearningRate, *, divide_by_tokens: bool = False
) -> TrainablePolicy:
    """Wrap `models` for training.

    `divide_by_tokens` divides the summed gradient by the tokens the loss functions count, as supervised training wants;
    without it the loss functions' own denominators stand.
    """
    wrapper_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=recipe.parallel.distributed_optimizer,
        overlap_grad_reduce=recipe.parallel.overlap_gradient_reduce,
        overlap_param_gather=recipe.parallel.overlap_parameter_gather,
        # Megatron's own check raises on one rank; guards.py lets all ranks agree and skip the update instead.
        check_for_nan_in_grad=False,
    )
    chunks = [
        DistributedDataParallel(model.config, wrapper_config, model, disable_bucketing=index > 0)
        for index, model in enumerate(models)
    ]
    register_adam()
    optimizer = get_megatron_optimizer(_optimizer_config(recipe, learning_rate), chunks)
    scheduler = _scheduler(optimizer, learning_rate, recipe.training.weight_decay)
    for chunk in chunks:
        config = chunk.module.config
        config.finalize_model_grads_func = finalize_model_grads if divide_by_tokens else _finalize_summed_gradients
        config.grad_scale_func = optimizer.scale_loss
        if recipe.parallel.overlap_gradient_reduce:
            # The schedules hold the reduction back until the last micro-batch.
            config.no_sync_func = [each.no_sync for each in chunks] if len(chunks) > 1 else chunk.no_sync
        if recipe.parallel.overlap_parameter_gather:
            _gather_output_layer_in_time(chunk)
    return TrainablePolicy(chunks=chunks, optimizer=optimizer, scheduler=scheduler)


def _gather_output_layer_in_time(chunk: DistributedDataParallel) -> None:
    """Wait for the output layer's weight before the norm in front of it runs.

    Megatron waits for a module's parameters when the module is called; log-probs take this weight without a call.
    """
    model = chunk.module
    if not model.post_process:
        return
    bucket = chunk.param_to_bucket_group[model.output_weight()]
    model.decoder.final_layernorm.register_forward_pre_hook(lambda *_: bucket.finish_param_sync())


def _finalize_summed_gradients(
    model: list[torch.nn.Module], num_tokens: torch.Tensor | None = None, **options: object
) -> None:
    """Megatron's reduction over ranks, without its division by `num_tokens`."""
    del num_tokens
    finalize_model_grads(model, None, **options)


def _optimizer_config(recipe: Recipe, learning_rate: LearningRate) -> OptimizerConfig:
    training = recipe.training
    bfloat16 = recipe.model.dtype == "bfloat16"
    return OptimizerConfig(
        optimizer="adam",
        lr=learning_rate.peak,
        min_lr=learning_rate.minimum,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_eps=training.adam_epsilon,
        clip_grad=training.gradient_clip,
        bf16=bfloat16,
        params_dtype=torch.bfloat16 if bfloat16 else torch.float32,
        use_distributed_optimizer=recipe.parallel.distributed_optimizer,
        overlap_param_gather=recipe.parallel.overlap_parameter_gather,
    )


def _scheduler(
    optimizer: MegatronOptimizer, learning_rate: LearningRate, weight_decay: float
) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        # Megatron starts the warm-up at `init_lr` itself; from 0 the first update would be thrown away.
        init_lr=learning_rate.peak / (learning_rate.warmup_updates + 1),
        max_lr=learning_rate.peak,
        min_lr=learning_rate.minimum,
        lr_warmup_steps=learning_rate.warmup_updates,
        # Megatron wants more decay steps than warm-up steps, also where nothing decays.
        lr_decay_steps=max(learning_rate.total_updates, learning_rate.warmup_updates + 1),
        lr_decay_style=learning_rate.shape,
        start_wd=weight_decay,
        end_wd=weight_decay,
        wd_incr_steps=1,
        wd_incr_style="constant",
    )
