"""The supervised cold start.

In: a recipe, whose task or data set yields demonstrations. Out: a Hugging Face checkpoint to start reinforcement
learning from, as the paper starts from a cold-start model (§5.1). Where demonstrations err on purpose, the policy that
learns from them errs when sampled while its most likely answer is right: there is something to reinforce.

The router's load-balance loss is on here, so that no expert is born dead, and never in reinforcement learning.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch

from megatron_gspo import parallel
from megatron_gspo.config import Recipe, require_data_files
from megatron_gspo.data.demonstrations import open_demonstrations
from megatron_gspo.model.hf_weights import save_hf_checkpoint
from megatron_gspo.model.policy import TokenLogProbs
from megatron_gspo.report.metrics import refuse_used_checkpoint
from megatron_gspo.training.agreement import on_main_rank
from megatron_gspo.training.assembly import build_models
from megatron_gspo.training.display import Display
from megatron_gspo.training.experience import pack_samples
from megatron_gspo.training.forward import run_micro_batches
from megatron_gspo.training.guards import SkippedUpdates, problem_of_any_rank
from megatron_gspo.training.optimizer import LearningRate, TrainablePolicy, build_trainable_policy
from megatron_gspo.training.rollouts import load_tokenizer, pad_token_id
from megatron_gspo.training.totals import Totals
from megatron_gspo.types import MicroBatch

logger = logging.getLogger(__name__)


def warmstart(recipe: Recipe, output_dir: Path) -> None:
    """Train on demonstrations and write the checkpoint to `output_dir`. Every rank calls this.

    Raises:
        UserError: the model or data cannot be used.
        TrainingDivergedError: updates kept being non-finite.
    """
    settings = recipe.warmstart
    on_main_rank(lambda: refuse_used_checkpoint(output_dir))
    tokenizer = load_tokenizer(recipe.model.path)
    policy = build_trainable_policy(
        build_models(recipe, load_balance_coefficient=settings.load_balance_coefficient),
        recipe,
        LearningRate(
            peak=settings.learning_rate,
            minimum=settings.min_learning_rate,
            warmup_updates=settings.warmup_steps,
            total_updates=settings.steps,
            shape=settings.learning_rate_schedule,
        ),
        divide_by_tokens=True,
    )
    skipped = SkippedUpdates(recipe.training.max_skipped_updates)
    require_data_files(recipe)
    stream = open_demonstrations(
        recipe.data.train,
        recipe.data,
        tokenizer,
        max_prompt_tokens=recipe.rollout.max_prompt_tokens,
        max_response_tokens=recipe.max_sequence_tokens - recipe.rollout.max_prompt_tokens,
        seed=recipe.seed,
        wrong_step_fraction=settings.wrong_step_fraction,
    )
    display = Display("cold start", settings.steps, enabled=parallel.is_main_rank(), plain_every=20)
    display.start([f"cold start on {recipe.data.train}, policy {recipe.model.path}"])
    try:
        for step in range(1, settings.steps + 1):
            started = time.perf_counter()
            demonstrations = stream.next_demonstrations(settings.sequences_per_step)
            samples = [demonstration.sample(index) for index, demonstration in enumerate(demonstrations)]
            own = samples[parallel.data_rank() :: parallel.data_size()]
            micro_batches = pack_samples(own, recipe, pad_token_id(tokenizer))
            metrics = supervised_step(policy, micro_batches, skipped, step)
            seconds = time.perf_counter() - started
            display.show({"step": step, "time/step_s": seconds} | metrics)
    finally:
        display.stop()
    policy.gather_parameters()
    save_hf_checkpoint(policy.models, output_dir, recipe.model.path)


def supervised_step(
    policy: TrainablePolicy, micro_batches: tuple[MicroBatch, ...], skipped: SkippedUpdates, step: int
) -> dict[str, float]:
    """One update towards the demonstrations' tokens; the loss is their mean negative log-likelihood."""

    def negative_log_likelihood(
        position: int, micro_batch: MicroBatch, output: TokenLogProbs
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, int]]:
        del position
        loss = -output.log_probs.sum()
        return loss, (loss.detach(), len(micro_batch.target_token_ids))

    policy.clear_gradients()
    measured = run_micro_batches(
        policy.chunks, micro_batches, negative_log_likelihood, temperature=1.0, with_entropy=False
    )
    totals = Totals()
    for loss, count in measured:
        totals.add("loss/supervised", float(loss), count)
    problem = problem_of_any_rank(policy, None)
    if problem is not None:
        skipped.skipped(step, problem)
        return {}
    learning_rate = policy.learning_rate
    _, gradient_norm, _ = policy.optimizer.step()
    policy.scheduler.step(1)
    skipped.made()
    combined = totals.over_ranks(measured_here=parallel.reports_metrics())
    loss_sum, num_tokens = combined.sums["loss/supervised"]
    return {"loss/supervised": loss_sum / num_tokens, "grad_norm": float(gradient_norm), "lr": learning_rate}
