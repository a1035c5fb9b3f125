"""What a person watches while training runs.

In: each step's metrics, as they are written. Out: on a terminal a live line with progress, reward, clip fraction, speed
and time left; elsewhere one plain line a step.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from megatron_gspo.config import Recipe

#: metric, what to call it, format; a metric a step does not have is left out
SHOWN = (
    ("loss/supervised", "loss", "{:.4f}"),
    ("reward/mean", "reward", "{:.3f}"),
    ("response/length_mean", "length", "{:.0f}"),
    ("clip/token_fraction", "clipped", "{:.2%}"),
    ("routing/change_rate", "rerouted", "{:.2%}"),
    ("entropy/mean", "entropy", "{:.3f}"),
    ("grad_norm", "grad", "{:.2f}"),
    ("throughput/tokens_per_s", "tokens/s", "{:,.0f}"),
)


def describe(metrics: Mapping[str, float]) -> str:
    """The metrics of one step that a person follows, in one line."""
    parts = [f"{label} {form.format(metrics[name])}" for name, label, form in SHOWN if name in metrics]
    parts += [
        f"held-out {name.removeprefix('eval/')} {value:.3f}"
        for name, value in metrics.items()
        if name.startswith("eval/") and name.endswith("/pass_at_1")
    ]
    return "  ".join(parts)


def introduction(recipe: Recipe, output_dir: Path) -> list[str]:
    """What is about to run, in the words of the recipe."""
    objective, training, parallel = recipe.objective, recipe.training, recipe.parallel
    group = recipe.rollout.responses_per_prompt
    return [
        f"{objective.name} on {recipe.data.train}, policy {recipe.model.path}",
        f"{training.steps} steps of {training.prompts_per_step} prompts × {group} responses, "
        f"{training.mini_batches} mini-batches; ranks: {parallel.world_size} (tensor {parallel.tensor}, "
        f"expert {parallel.expert}, pipeline {parallel.pipeline}, data {parallel.data})",
        f"metrics go to {output_dir / 'metrics.jsonl'}",
    ]


def say_what_next(recipe: Recipe, output_dir: Path) -> None:
    """Where the results are, and what to type next."""
    checkpoint = output_dir / "checkpoints" / f"hf_step_{recipe.training.steps}"
    print(
        f"Done. Curves: {output_dir / 'report.html'}; metrics: {output_dir / 'metrics.jsonl'}; "
        f"the policy, as a Hugging Face checkpoint: {checkpoint}\n"
        f"Next: megatron-gspo evaluate {output_dir / 'recipe.yaml'} --checkpoint {checkpoint}"
        + (f"\n      tensorboard --logdir {output_dir / 'tensorboard'}" if recipe.logging.tensorboard else "")
    )


def say_how_to_go_on(step: int, output_dir: Path, why: str | None) -> None:
    """What to type where a run stopped: as it was asked to, or for what `why` says."""
    print(
        f"Stopped {'as asked' if why is None else 'without a rollout engine'}, after step {step}, with a checkpoint of it"
        f"{'' if why is None else f': {why}'}.\n"
        f"Next: megatron-gspo train {output_dir / 'recipe.yaml'} --output-dir {output_dir} --resume"
    )


def duration(seconds: float) -> str:
    """Seconds as a person says them: 45s, 3m20s, 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


@dataclass
class Display:
    """Progress of a run of `total_steps`. Ranks other than the first get one that is not `enabled` and shows nothing."""

    label: str
    total_steps: int
    enabled: bool = True
    console: Console = field(default_factory=lambda: Console(file=sys.stdout))
    plain_every: int = 1
    steps_before: int = 0  # made by the run that this one goes on with
    _started: float = field(default_factory=time.perf_counter)
    _first_step_done: float | None = None
    _progress: Progress | None = None
    _task: TaskID | None = None

    def start(self, details: Sequence[str] = ()) -> None:
        """Begin; `details` are said once, above the progress."""
        if not self.enabled:
            return
        for line in details:
            self.console.print(line, highlight=False, soft_wrap=True)
        self._started = time.perf_counter()
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                TextColumn("{task.fields[metrics]}"),
                console=self.console,
            )
            self._task = self._progress.add_task(
                self.label, total=self.total_steps, completed=self.steps_before, metrics="", left=""
            )
            self._progress.start()

    def show(self, metrics: Mapping[str, float]) -> None:
        """Show a step's metrics; step 0 is the evaluation before training."""
        if not self.enabled:
            return
        step = int(metrics["step"])
        text = describe(metrics)
        left = self._time_left(step)
        evaluated = any(name.startswith("eval/") for name in metrics)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, metrics=text, left=left)
            if evaluated:
                self._progress.console.print(f"step {step}: {text}", highlight=False)
        elif text and (evaluated or step % self.plain_every == 0 or step == self.total_steps):
            self.console.print(
                f"{self.label} {step}/{self.total_steps}  {text}  {left}".rstrip(), highlight=False, soft_wrap=True
            )

    def stop(self) -> None:
        """End the live display, leaving its last state on the terminal."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _time_left(self, step: int) -> str:
        """From the steps after the first, which alone pays for warming up."""
        now = time.perf_counter()
        steps_made = step - self.steps_before
        if steps_made < 1 or step >= self.total_steps:
            return ""
        if self._first_step_done is None:
            self._first_step_done = now
            return f"about {duration((now - self._started) * (self.total_steps - step))} left"
        return f"{duration((now - self._first_step_done) / (steps_made - 1) * (self.total_steps - step))} left"
