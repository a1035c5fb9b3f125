"""The training loop.

In: a recipe and a run directory, new or to go on with. Out: the run directory, filled (`report/metrics.py` says with
what), with checkpoints to go on from and, at the end, the trained policy as a Hugging Face checkpoint.

A step, in the order the data flows: prompts, rollouts, rewards and group advantages (`collector`), packing plan, old log-probs,
mini-batch updates, weights to the rollout engine, evaluation, checkpoint, metrics.
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
from megatron_gspo.report.metrics import RunDirectory, has_metrics, refuse_used_directory
from megatron_gspo.report.run_report import write_report
from megatron_gspo.training.agreement import OutageError, on_any_rank, on_main_rank
from megatron_gspo.training.assembly import Run, assemble, with_clip_range
from megatron_gspo.training.checkpoint import load_checkpoint
from megatron_gspo.training.checkpoint_saver import CheckpointSaver
from megatron_gspo.training.checkpoint_store import CheckpointStore
from megatron_gspo.training.display import Display, describe, introduction, say_how_to_go_on, say_what_next
from megatron_gspo.training.evaluation import evaluate
from megatron_gspo.training.experience import Experience, plan_mini_batches
from megatron_gspo.training.guards import SkippedUpdates
from megatron_gspo.training.hand_over import release_memory
from megatron_gspo.training.old_policy import baseline_log_probs
from megatron_gspo.training.outage import Reached, save_reached
from megatron_gspo.training.resume import FoundCheckpoint, find_checkpoint
from megatron_gspo.training.rollouts import pad_token_id
from megatron_gspo.training.step import MiniBatchLoss, update_policy
from megatron_gspo.training.step_metrics import Stopwatch, record_experience, timings, with_reward_spread
from megatron_gspo.training.stopping import StopRequest
from megatron_gspo.training.totals import Totals
from megatron_gspo.training.volatility import StepVolatility

logger = logging.getLogger(__name__)
progress_log = logging.getLogger("megatron_gspo.progress")  # log.txt alone: the display shows the same


def train(
    recipe: Recipe,
    output_dir: Path,
    *,
    resume: bool = False,
    resume_from: int | None = None,
    servers: Path | None = None,
) -> bool:
    """Run the recipe. Every rank calls this; rank 0 writes the run directory.

    Args:
        recipe: what to run.
        output_dir: the run directory; a new one, or that of the run to go on with.
        resume: go on from the newest checkpoint in `output_dir`.
        resume_from: go on from the checkpoint of this step instead.
        servers: the directory of a job's SGLang servers (`rollout.serve`), which are then not started here.

    Returns:
        Whether the run came to its end; False where a signal asked it to stop, or no rollout engine was left, with a
        checkpoint of its last finished step.

    Raises:
        UserError: the recipe, model, data or checkpoint cannot be used.
        TrainingDivergedError: updates kept being non-finite.
        SaveFailedError: a checkpoint could not be written.
    """
    stop = StopRequest()
    recipe = with_clip_range(recipe)
    store = CheckpointStore(output_dir / "checkpoints")
    found = find_checkpoint(store, recipe, resume_from) if resume or resume_from is not None else None
    if found is None:
        on_main_rank(lambda: refuse_used_directory(output_dir))
    run = assemble(recipe, servers)
    skipped = SkippedUpdates(recipe.training.max_skipped_updates)
    if found is not None:
        load_checkpoint(run, found.path, found.state, skipped)
        run.hand_over_weights()
    reached = reached_so_far(run, found)
    directory = open_run_directory(recipe, output_dir, found) if parallel.is_main_rank() else None
    display = Display("step", recipe.training.steps, enabled=parallel.is_main_rank(), steps_before=reached.step)
    display.start(introduction(recipe, output_dir))
    try:
        with checkpoint_saver(recipe, store) as saver:
            no_engine = make_steps(Progress(run, reached, skipped, saver, directory, display, stop))
    finally:
        display.stop()
        run.close()
        if directory is not None:
            directory.close()
    finished = reached.step >= recipe.training.steps and no_engine is None
    if finished:
        save_policy(run, reached.step, output_dir)
    # No rank leaves before the main one is done: a launcher may end what lives on after the first has gone.
    on_main_rank(lambda: write_report(output_dir) if has_metrics(output_dir) else None)
    if parallel.is_main_rank():
        say_what_next(recipe, output_dir) if finished else say_how_to_go_on(reached.step, output_dir, no_engine)
    return finished


def reached_so_far(run: Run, found: FoundCheckpoint | None) -> Reached:
    """Where a run begins: before its first step, whose policy is to be evaluated, or where its checkpoint was taken."""
    prompts = run.prompts.state()
    if found is None:
        return Reached(0, step_line(0, run, {}), prompts, owes_evaluation=True, is_saved=False)
    state = found.state
    return Reached(state.step, dict(state.metrics), prompts, state.owes_evaluation, is_saved=True)


@dataclass(frozen=True)
class Progress:
    """A run under way, and what its steps are saved, recorded and shown with."""

    run: Run
    reached: Reached
    skipped: SkippedUpdates
    saver: CheckpointSaver
    directory: RunDirectory | None  # the main rank's
    display: Display
    stop: StopRequest


def make_steps(progress: Progress) -> str | None:
    """The evaluation that is owed, and step after step, until all are made or the ranks are asked to stop.

    Returns:
        Where the rollout engine was gone before that, what was wrong with it; the last finished step is then saved.
    """
    run, reached = progress.run, progress.reached
    try:
        if reached.owes_evaluation:
            record(progress.directory, progress.display, reached.evaluated(evaluate_if_due(run, reached.step)))
        stopping = False
        while reached.step < run.recipe.training.steps and not stopping:
            stopping = take_step(progress)
    except OutageError as outage:
        save_reached(outage, run, reached, progress.skipped, progress.saver)
        return str(outage)
    return None


def take_step(progress: Progress) -> bool:
    """One step, saved where that is due, and recorded. Returns whether the ranks were asked to stop after it."""
    run, reached = progress.run, progress.reached
    step = reached.step + 1
    experience = run.collector.collect(step, run.policy.version)
    run.collector.sample_ahead(step + 1, run.policy.version + 1)
    clock = Stopwatch()
    with clock.measure("copy"):
        progress.saver.wait_until_copied()
    result = learn(run, experience, step, progress.skipped)
    reached.go_on_to(run, step, step_line(step, run, result.metrics))
    if progress.directory is not None and result.volatility:
        progress.directory.write_volatility(step, result.volatility)
    line = reached.evaluated(evaluate_if_due(run, step))
    run.collector.go_on()  # what a hand-over of weights held up
    # A signal may reach one rank only, and between any two steps of the others.
    stopping = on_any_rank(progress.stop.requested)
    checkpoint_s = clock.seconds["copy"] + save_if_due(progress, line, stopping=stopping)
    record(progress.directory, progress.display, line | {"time/checkpoint_s": checkpoint_s})
    return stopping


def save_if_due(progress: Progress, line: dict[str, float], *, stopping: bool) -> float:
    """Save every n steps and at the end. Returns the seconds for which the run stood still."""
    reached, saver, training = progress.reached, progress.saver, progress.run.recipe.training
    clock = Stopwatch()
    with clock.measure("checkpoint"):
        saver.finish_if_written()
        is_last = stopping or reached.step == training.steps
        if is_last or (training.save_every > 0 and reached.step % training.save_every == 0):
            saver.save(progress.run, reached.step, progress.skipped, line)
            reached.is_saved = True
        if is_last:
            saver.finish()
    return clock.seconds["checkpoint"]


def checkpoint_saver(recipe: Recipe, store: CheckpointStore) -> CheckpointSaver:
    """What saves the run's checkpoints, as the recipe says."""
    training = recipe.training
    return CheckpointSaver(store, keep=training.keep_checkpoints, in_background=training.background_save)


def open_run_directory(recipe: Recipe, output_dir: Path, found: FoundCheckpoint | None) -> RunDirectory:
    """Start the run's files, or go on with them after the step of the checkpoint that was found."""
    recipe_yaml, environment = dump_recipe(recipe), describe_environment(recipe.parallel.world_size)
    tensorboard, wandb_project = recipe.logging.tensorboard, recipe.logging.wandb_project
    if found is None:
        return RunDirectory.create(
            output_dir, recipe_yaml, environment, tensorboard=tensorboard, wandb_project=wandb_project
        )
    return RunDirectory.go_on(
        output_dir,
        recipe_yaml,
        environment,
        found.state.metrics,
        record_line=not found.state.owes_evaluation,
        tensorboard=tensorboard,
        wandb_project=wandb_project,
    )


@dataclass(frozen=True)
class StepResult:
    """What a step came to; the same on every rank, but for times, throughput and memory, which are a rank's own."""

    metrics: dict[str, float]
    volatility: Mapping[str, np.ndarray]  # what `volatility/step_*.npz` keeps; empty where nothing was measured


def learn(run: Run, experience: Experience, step: int, skipped: SkippedUpdates) -> StepResult:
    """Update the policy mini-batch by mini-batch, and give its weights to the rollout engine."""
    recipe, totals, clock = run.recipe, Totals(), Stopwatch()
    mini_batches = plan_mini_batches(experience, recipe, pad_token_id(run.tokenizer))
    if recipe.rollout.sglang.release_memory:
        release_memory(run.rollouts)  # the plan counts responses of all ranks, so all have theirs
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
        run.policy.gather_parameters()
        run.policy.version += 1
        weight_bytes = run.hand_over_weights()
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
        | {"throughput/weight_sync_gb_per_s": weight_bytes / 1e9 / clock.seconds["weight_sync"]}
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


def save_policy(run: Run, step: int, output_dir: Path) -> None:
    """Write the trained policy as a Hugging Face checkpoint. Every rank takes part."""
    path = output_dir / "checkpoints" / f"hf_step_{step}"
    save_hf_checkpoint(run.policy.models, path, run.recipe.model.path)
    logger.info("step %d: saved %s", step, path)


def step_line(step: int, run: Run, metrics: dict[str, float]) -> dict[str, float]:
    """A step's line of metrics; step 0 is the policy before any update and has only its evaluation."""
    return {"step": step, "policy_version": run.policy.version} | metrics


def record(directory: RunDirectory | None, display: Display, line: dict[str, float]) -> None:
    """Write and show a step's metrics."""
    measured = len(line) > len(("step", "policy_version"))
    if directory is not None and measured:
        directory.write(line)
    progress_log.info("step %d: %s", int(line["step"]), describe(line))
    display.show(line)
