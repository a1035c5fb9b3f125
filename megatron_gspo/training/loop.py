"""The training loop.

In: a recipe and a run directory. Out: the run directory, filled (`report/metrics.py` says with what), and the trained
policy as a Hugging Face checkpoint in it.

A step, in the order the data flows: prompts, rollouts and rewards, group advantages, packing plan, old log-probs,
mini-batch updates, weights to the rollout engine, evaluation, metrics.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from megatron_gspo import parallel
from megatron_gspo.config import Recipe, dump_recipe
from megatron_gspo.environment import describe_environment, peak_memory_gib
from megatron_gspo.model.hf_weights import save_hf_checkpoint
from megatron_gspo.policy_loss import finalize_metrics
from megatron_gspo.report.curves import write_report
from megatron_gspo.report.metrics import RunDirectory
from megatron_gspo.training.assembly import Run, assemble
from megatron_gspo.training.display import Display, introduction, say_what_next
from megatron_gspo.training.evaluation import SOLVED_REWARD, evaluate
from megatron_gspo.training.experience import Experience, MiniBatch, collect_experience, plan_mini_batches
from megatron_gspo.training.guards import SkippedUpdates
from megatron_gspo.training.old_policy import baseline_log_probs
from megatron_gspo.training.rollouts import hand_over_weights, pad_token_id, training_settings
from megatron_gspo.training.step import MiniBatchLoss, update_policy
from megatron_gspo.training.totals import Totals

logger = logging.getLogger(__name__)


def train(recipe: Recipe, output_dir: Path) -> None:
    """Run the recipe. Every rank calls this; rank 0 writes the run directory.

    Raises:
        UserError: the recipe, model or data cannot be used.
        TrainingDivergedError: updates kept being non-finite.
    """
    run = assemble(recipe)
    recipe = run.recipe
    directory = open_run_directory(recipe, output_dir) if parallel.is_main_rank() else None
    display = Display("step", recipe.training.steps, enabled=parallel.is_main_rank())
    skipped = SkippedUpdates(recipe.training.max_skipped_updates)
    display.start(introduction(recipe, output_dir))
    try:
        record(directory, display, 0, run, evaluate_if_due(run, 0))
        for step in range(1, recipe.training.steps + 1):
            metrics = train_step(run, step, skipped)
            metrics |= evaluate_if_due(run, step)
            record(directory, display, step, run, metrics)
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


def train_step(run: Run, step: int, skipped: SkippedUpdates) -> dict[str, float]:
    """One step of reinforcement learning: sample, score, and update the policy mini-batch by mini-batch."""
    recipe, totals, clock = run.recipe, Totals(), Stopwatch()
    prompts = run.prompts.next_prompts(recipe.training.prompts_per_step)
    experience = collect_experience(prompts, run.rollouts, recipe, training_settings(recipe, run.tokenizer, step))
    mini_batches = plan_mini_batches(experience, recipe, pad_token_id(run.tokenizer))
    with clock.measure("old_policy"):
        baseline = baseline_log_probs(run.policy.chunks, run.reference, mini_batches, recipe, totals)
    with clock.measure("update"):
        for number, mini_batch in enumerate(mini_batches):
            reference = baseline.reference[number] if baseline.reference is not None else None
            loss = MiniBatchLoss(recipe, mini_batch, baseline.old[number], reference)
            engine_only = number == 0 and recipe.rollout.old_log_probs == "engine"
            update_policy(run.policy, mini_batch, loss, skipped, step, totals, measure_mismatch=engine_only)
    with clock.measure("weight_sync"):
        run.policy.version += 1
        hand_over_weights(run.policy.models, run.rollouts, run.policy.version)
    record_experience(experience, mini_batches, recipe.training.tokens_per_micro_batch, totals)
    combined = totals.over_ranks(measured_here=parallel.reports_metrics())
    return (
        with_reward_spread(finalize_metrics(combined.sums))
        | combined.maxima
        | combined.counts
        | {"updates/num_skipped": float(skipped.total)}
        | timings(clock, experience, combined)
    )


def record_experience(experience: Experience, mini_batches: list[MiniBatch], token_budget: int, totals: Totals) -> None:
    """Measure rewards, groups and responses of this data-parallel rank."""
    for group in experience.groups:
        totals.add("groups/zero_variance_fraction", float(group.rewards.min() == group.rewards.max()), 1)
        totals.add("reward/mean", float(group.rewards.sum()), len(group.rewards))
        totals.add("reward/square_mean", float((group.rewards.astype(float) ** 2).sum()), len(group.rewards))
        totals.add("reward/solved_fraction", float((group.rewards >= SOLVED_REWARD).sum()), len(group.rewards))
        for response in group.responses:
            totals.add("response/length_mean", len(response.token_ids), 1)
            totals.add("response/truncated_fraction", response.finish_reason == "length", 1)
            totals.count("tokens", len(response.token_ids) + len(group.prompt.token_ids))
    totals.count("reward/num_failed", experience.num_failed_rewards)
    for micro_batch in (micro_batch for mini_batch in mini_batches for micro_batch in mini_batch.micro_batches):
        packed = len(micro_batch.token_ids) - micro_batch.num_padding_tokens
        totals.add("packing/fill_fraction", packed, max(token_budget, packed))


def with_reward_spread(metrics: dict[str, float]) -> dict[str, float]:
    """Add `reward/std`, the standard deviation over all responses of the step, in place of the second moment."""
    variance = metrics.pop("reward/square_mean") - metrics["reward/mean"] ** 2
    return metrics | {"reward/std": math.sqrt(max(variance, 0.0))}


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


def record(directory: RunDirectory | None, display: Display, step: int, run: Run, metrics: dict[str, float]) -> None:
    """Write and show a step's metrics; step 0 is the policy before any update and has only its evaluation."""
    line = {"step": step, "policy_version": run.policy.version} | metrics
    if directory is not None and (step > 0 or metrics):
        directory.write(line)
    display.show(line)


def timings(clock: Stopwatch, experience: Experience, combined: Totals) -> dict[str, float]:
    """Seconds by stage, and tokens (prompts and responses, of all ranks) a second of the whole step."""
    seconds = {"rollout": experience.rollout_s, "reward": experience.reward_s} | clock.seconds
    total_s = clock.since_start()
    return {f"time/{name}_s": value for name, value in seconds.items()} | {
        "time/step_s": total_s,
        "throughput/tokens_per_s": combined.counts["tokens"] / total_s,
        "memory/peak_gib": peak_memory_gib(),
    }


@dataclass
class Stopwatch:
    """Wall-clock seconds by stage, on this rank."""

    started: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the time of the block to `stage`."""
        started = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started

    def since_start(self) -> float:
        """Seconds since the stopwatch was made."""
        return time.perf_counter() - self.started
