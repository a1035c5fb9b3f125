"""The training loop.

In: a recipe and a run directory. Out: the run directory, filled (`report/metrics.py` says with what), and the trained
policy as a Hugging Face checkpoint in it.

A step, in the order the data flows: prompts, rollouts and rewards, group advantages, packing plan, old log-probs,
mini-batch updates, weights to the rollout engine, evaluation, metrics.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_gspo import parallel
from megatron_gspo.config import Recipe, dump_recipe
from megatron_gspo.environment import describe_environment
from megatron_gspo.model.hf_weights import save_hf_checkpoint
from megatron_gspo.policy_loss import finalize_metrics
from megatron_gspo.report.curves import write_report
from megatron_gspo.report.metrics import RunDirectory, refuse_used_directory
from megatron_gspo.training.assembly import Run, assemble
from megatron_gspo.training.display import Display, describe, introduction, say_what_next
from megatron_gspo.training.evaluation import evaluate
from megatron_gspo.training.experience import Experience, collect_experience, plan_mini_batches
from megatron_gspo.training.guards import SkippedUpdates
from megatron_gspo.training.old_policy import baseline_log_probs
from megatron_gspo.training.rollouts import hand_over_weights, pad_token_id, training_settings
from megatron_gspo.training.step import MiniBatchLoss, update_policy
from megatron_gspo.training.step_metrics import Stopwatch, record_experience, timings, with_reward_spread
from megatron_gspo.training.totals import Totals
from megatron_gspo.training.volatility import StepVolatility

logger = logging.getLogger(__name__)
progress_log = logging.getLogger("megatron_gspo.progress")  # log.txt alone: the display shows the same


def train(recipe: Recipe, output_dir: Path) -> None:
    """Run the recipe. Every rank calls this; rank 0 writes the run directory.

    Raises:
        UserError: the recipe, model or data cannot be used.
        TrainingDivergedError: updates kept being non-finite.
    """
    parallel.together(lambda: refuse_used_directory(output_dir) if parallel.is_main_rank() else None)
    run = assemble(recipe)
    recipe = run.recipe
    directory = open_run_directory(recipe, output_dir) if parallel.is_main_rank() else None
    display = Display("step", recipe.training.steps, enabled=parallel.is_main_rank())
    skipped = SkippedUpdates(recipe.training.max_skipped_updates)
    display.start(introduction(recipe, output_dir))
    try:
        record(directory, display, 0, run, evaluate_if_due(run, 0))
        for step in range(1, recipe.training.steps + 1):
            experience = collect_step_experience(run, step)
            result = learn(run, experience, step, skipped)
            record(directory, display, step, run, result.metrics | evaluate_if_due(run, step), result.volatility)
            save_if_due(run, step, output_dir)
    finally:
        display.stop()
        run.close()
        if directory is not None:
            directory.close()
    if parallel.is_main_rank():
        write_report(output_dir)
        say_what_next(recipe, output_dir)


def open_run_directory(recipe: Recipe, output_dir: Path) -> RunDirectory:
    """Start the run's files."""
    return RunDirectory.create(
        output_dir,
        dump_recipe(recipe),
        describe_environment(recipe.parallel.world_size),
        tensorboard=recipe.logging.tensorboard,
        wandb_project=recipe.logging.wandb_project,
    )


@dataclass(frozen=True)
class StepResult:
    """What a step came to; the same on every rank, but for times, throughput and memory, which are a rank's own."""

    metrics: dict[str, float]
    volatility: Mapping[str, np.ndarray]  # what `volatility/step_*.npz` keeps; empty where nothing was measured


def collect_step_experience(run: Run, step: int) -> Experience:
    """The next prompts' responses, scored: this data-parallel rank's groups."""
    prompts = run.prompts.next_prompts(run.recipe.training.prompts_per_step)
    return collect_experience(prompts, run.rollouts, run.recipe, training_settings(run.recipe, run.tokenizer, step))


def learn(run: Run, experience: Experience, step: int, skipped: SkippedUpdates) -> StepResult:
    """Update the policy mini-batch by mini-batch, and give its weights to the rollout engine."""
    recipe, totals, clock = run.recipe, Totals(), Stopwatch()
    mini_batches = plan_mini_batches(experience, recipe, pad_token_id(run.tokenizer))
    volatility = StepVolatility(run.routing, run.policy, recipe, experience, mini_batches, step, clock)
    with clock.measure("old_policy"), volatility.old_policy_pass():
        baseline = baseline_log_probs(run.policy.chunks, run.reference, mini_batches, recipe, totals)
    for number, mini_batch in enumerate(mini_batches):
        with clock.measure("update"):
            reference = baseline.reference[number] if baseline.reference is not None else None
            loss = MiniBatchLoss(recipe, mini_batch, baseline.old[number], reference)
            update_policy(
                run.policy,
                mini_batch,
                loss,
                skipped,
                step,
                totals,
                measure_mismatch=number == 0 and recipe.rollout.old_log_probs == "engine",
                routing=volatility.update_pass(number),
            )
        volatility.after_update(number)
    with clock.measure("weight_sync"):
        run.policy.version += 1
        hand_over_weights(run.policy.models, run.rollouts, run.policy.version)
    record_experience(experience, mini_batches, recipe.training.tokens_per_micro_batch, totals)
    combined = totals.over_ranks(measured_here=parallel.reports_metrics())
    routing_metrics, arrays = volatility.results()
    metrics = (
        with_reward_spread(finalize_metrics(combined.sums))
        | combined.maxima
        | combined.counts
        | routing_metrics
        | {"updates/num_skipped": float(skipped.total), "data/num_too_long": float(run.prompts.num_too_long)}
        | timings(clock, experience, combined)
    )
    return StepResult(metrics, arrays)


def evaluate_if_due(run: Run, step: int) -> dict[str, float]:
    """Evaluation before the first step, every n steps, and after the last one."""
    every = run.recipe.evaluation.every
    due = step in (0, run.recipe.training.steps) or (every > 0 and step % every == 0)
    if run.held_out is None or not due:
        return {}
    clock = Stopwatch()
    with clock.measure("evaluation"):
        metrics = evaluate(run.recipe, run.held_out, run.rollouts)
    return metrics | {f"time/{name}_s": seconds for name, seconds in clock.seconds.items()}


def save_if_due(run: Run, step: int, output_dir: Path) -> None:
    """Write the policy as a Hugging Face checkpoint every n steps and after the last one. Every rank takes part."""
    every = run.recipe.training.save_every
    if step == run.recipe.training.steps or (every > 0 and step % every == 0):
        path = output_dir / "checkpoints" / f"hf_step_{step}"
        save_hf_checkpoint(run.policy.models, path, run.recipe.model.path)
        logger.info("step %d: saved %s", step, path)


def record(
    directory: RunDirectory | None,
    display: Display,
    step: int,
    run: Run,
    metrics: dict[str, float],
    volatility: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write and show a step's metrics; step 0 is the policy before any update and has only its evaluation."""
    line = {"step": step, "policy_version": run.policy.version} | metrics
    if directory is not None and (step > 0 or metrics):
        directory.write(line)
        if volatility:
            directory.write_volatility(step, volatility)
    progress_log.info("step %d: %s", step, describe(line))
    display.show(line)
