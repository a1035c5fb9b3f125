"""`megatron-gspo report`: one page about one run.

In: a run directory. Out: the page: a head that answers what ran, on what, how far, whether it learned and what is wrong;
then training, expert volatility and cost.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from megatron_gspo.report import catalogue
from megatron_gspo.report.catalogue import Panel
from megatron_gspo.report.figure import COLORS, FILL_PATTERNS, Figure, Line, binned, compact, line_figure, number
from megatron_gspo.report.page import Fact, Page, Section, write_page
from megatron_gspo.report.read import RunRecord, Series, read_run
from megatron_gspo.report.routing_figures import routing_figures
from megatron_gspo.report.state import duration
from megatron_gspo.report.statistics import noise_std
from megatron_gspo.report.warnings import CHECKS, check_run, find_collapse

BADGES = {"finished": "good", "running": "neutral", "stopped": "neutral", "failed": "bad", "silent": "bad"}
LEARNED_NOISES = 2.0


def write_report(run: Path, output: Path | None = None) -> tuple[Page, Path]:
    """Draw the run in `run` into `output` (default: `report.html` in it); returns the page and where it is.

    Raises:
        UserError: `run` is no run directory or holds no metrics yet, or `output` cannot be written.
    """
    record = read_run(run)
    page = report_page(record)
    return page, write_page(page, output or run / "report.html")


def report_page(run: RunRecord) -> Page:
    """The page about a run."""
    warnings = check_run(run)
    notes = []
    if run.half_written:
        notes.append(
            "The last line of metrics.jsonl is half written and left out: the run was writing it, or ended there."
        )
    if not run.environment:
        notes.append("environment.json is missing: what the run ran on is unknown.")
    return Page(
        title=run.name,
        badge=run.state.kind,
        badge_kind=BADGES[run.state.kind],
        facts=head(run),
        warnings=warnings,
        all_clear=f"None of {len(CHECKS)} checks found anything wrong.",
        sections=[section for section in sections(run) if section.figures or section.absent],
        checks=[(check.title, check.rule) for check in CHECKS],
        notes=notes,
    )


def head(run: RunRecord) -> list[Fact]:
    """What ran, on what, how far, and did it learn."""
    return [
        Fact("What ran", what_ran(run)),
        Fact("On what", _on_what(run)),
        Fact("How far", _how_far(run)),
        Fact("Did it learn", did_it_learn(run)),
    ]


def what_ran(run: RunRecord) -> str:
    """Objective, clip range, replay, task, model and seed, from the recipe."""
    low, high = run.field("objective.clip_low"), run.field("objective.clip_high")
    clip = "its own clip range" if low is None or high is None else f"clip {low:g} / {high:g}"
    replay = run.field("routing.replay")
    shape = (
        f"{run.field('training.prompts_per_step')} prompts × {run.field('rollout.responses_per_prompt')} responses in "
        f"{run.field('training.mini_batches')} mini-batches"
    )
    routing = "" if replay == "off" else f", Routing Replay {str(replay).upper()}"
    return (
        f"{run.field('objective.name')} ({clip}){routing} on {_basename(run.field('data.train'))}, policy "
        f"{_basename(run.field('model.path'))}, learning rate {run.field('training.learning_rate'):g}, {shape}, seed "
        f"{run.field('seed')}"
    )


def did_it_learn(run: RunRecord) -> str:
    """Held-out pass@1 and the reward, before and after, each judged against its noise."""
    verdicts = []
    for name in run.matching("eval/*/pass_at_1"):
        series = run.series(name)
        if len(series) > 1:
            error = _evaluation_error(series, int(run.field("evaluation.prompts")))
            title = name.removeprefix("eval/").removesuffix("/pass_at_1")
            verdicts.append(_verdict(f"held-out {title} pass@1", series.values[0], series.values[-1], error, series))
    reward = run.series("reward/mean")
    if len(reward) > 1:
        first, last = reward.start(0.1), reward.end(0.1)
        error = noise_std(reward.values) * math.sqrt(1 / len(first) + 1 / len(last))
        verdicts.append(_verdict("reward", float(first.mean()), float(last.mean()), error, reward))
    return ". ".join(verdicts) + _fallen(run) if verdicts else "Too early to say: fewer than two steps are measured"


def sections(run: RunRecord) -> list[Section]:
    """All figures, in the order of the page."""
    training, no_training = panel_figures(run, catalogue.TRAINING)
    volatility, no_volatility = panel_figures(run, catalogue.VOLATILITY)
    routing = routing_figures(run)
    cost, no_cost = panel_figures(run, catalogue.COST)
    stages = time_by_stage(run)
    return [
        Section(
            "training", "Training", "Did it learn, and how far did each step move the policy?", training, no_training
        ),
        Section(
            "volatility",
            "Expert volatility",
            "Which experts change when the policy is updated, and what that does to the importance ratios (§5.3).",
            volatility[:1] + routing + volatility[1:],
            no_volatility + ([] if routing else ["Layers × steps, depth, position, expert flow, margins"]),
        ),
        Section(
            "cost", "Cost", "Where the time and memory went.", ([stages] if stages is not None else []) + cost, no_cost
        ),
    ]


def panel_figures(run: RunRecord, panels: tuple[Panel, ...]) -> tuple[list[Figure], list[str]]:
    """The panels that the run has metrics for, as figures; and the titles of the others."""
    figures, absent = [], []
    for panel in panels:
        lines = [line for line in panel_lines(run, panel) if len(line.series)]
        if not lines:
            absent.append(panel.title)
            continue
        figures.append(
            line_figure(
                panel.id, panel.title, lines, panel.axis, how_to_read=panel.how_to_read, definition=panel.definition
            )
        )
    return figures, absent


def panel_lines(run: RunRecord, panel: Panel) -> list[Line]:
    """A line for each metric of the panel that the run has."""
    lines = []
    for pattern, legend in panel.metrics.items():
        start, _, end = pattern.partition("*")
        for name in run.matching(pattern):
            filled = name.removeprefix(start).removesuffix(end)
            lines.append(Line(legend.replace("*", filled), run.series(name)))
    return lines


def time_by_stage(run: RunRecord) -> Figure | None:
    """Seconds of each stage, stacked."""
    names = [name for name in run.matching("time/*_s") if name != "time/step_s"]
    stages = [(name.removeprefix("time/").removesuffix("_s"), run.series(name)) for name in names]
    stages = [(stage, series) for stage, series in stages if series.values.sum() > 0]
    if not stages:
        return None
    stages.sort(key=lambda item: -item[1].values.sum())
    total = sum(float(series.values.sum()) for _, series in stages)
    steps = np.unique(np.concatenate([series.steps for _, series in stages]))
    traces: list[dict[str, Any]] = []
    for position, (stage, series) in enumerate(stages):
        whole = np.zeros(len(steps))  # a stage that a step does not have took it no time
        whole[np.searchsorted(steps, series.steps)] = series.values
        shown, _ = binned(Series(steps, whole))
        color = COLORS[position % len(COLORS)]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "stackgroup": "time",
                "name": f"{stage.replace('_', ' ')}, {series.values.sum() / total:.0%}",
                "x": shown.steps.tolist(),
                "y": compact(shown.values),
                "line": {"width": 1, "color": color},
                "fillpattern": {"shape": FILL_PATTERNS[position % len(FILL_PATTERNS)], "solidity": 0.35, "size": 6},
                "hovertemplate": "%{y:.3g} s",
            }
        )
    listed = ", ".join(f"{stage.replace('_', ' ')} {series.values.sum() / total:.0%}" for stage, series in stages)
    return Figure(
        id="time_by_stage",
        title="Time by stage",
        how_to_read="The widest band is where a faster run has to begin; the legend gives each stage's share of the whole.",
        definition="Wall-clock seconds of a step on the first rank, stage by stage.",
        description=f"Stacked areas over steps {steps[0]} to {steps[-1]}, {duration(total)} in all: {listed}.",
        traces=traces,
        layout={
            "xaxis": {"title": {"text": "step"}},
            "yaxis": {"title": {"text": "seconds a step"}, "rangemode": "tozero"},
            "hovermode": "x unified",
        },
        note="Each point is the mean of neighbouring steps." if len(traces[0]["x"]) < len(steps) else "",
    )


def _on_what(run: RunRecord) -> str:
    if not run.environment:
        return "unknown: environment.json is missing"
    machine, packages = run.environment.get("machine", {}), run.environment.get("packages", {})
    gpus = machine.get("num_gpus") or 0
    hardware = f"{gpus} × {machine.get('gpu_name')} a node" if gpus else f"CPU, {machine.get('num_cores')} cores"
    ranks = run.environment.get("num_ranks", 1)
    commit = str(run.environment.get("git_commit") or "")
    dirty = " with uncommitted changes" if commit.endswith("-dirty") else ""
    versions = ", ".join(
        f"{name} {packages[name]}"
        for name in ("torch", "megatron-core", "transformer-engine", "sglang")
        if packages.get(name)
    )
    return (
        f"{ranks} rank{'s' if ranks != 1 else ''}; {hardware}; rollouts by the {run.field('rollout.engine')} engine; "
        f"{versions}; megatron-gspo {run.environment.get('megatron_gspo')}"
        + (f" ({commit[:10]}{dirty})" if commit else "")
    )


def _how_far(run: RunRecord) -> str:
    seconds = run.series("time/step_s").values.sum() + run.series("time/evaluation_s").values.sum()
    tokens = run.series("tokens").values.sum()
    parts = [f"step {run.last_step:,} of {run.planned_steps:,}"]
    if seconds > 0:
        parts.append(f"{duration(float(seconds))} of steps")
    if tokens > 0:
        parts.append(f"{number(float(tokens))} tokens")
    return f"{', '.join(parts)}; {run.state.kind} ({run.state.evidence})"


def _verdict(what: str, first: float, last: float, error: float, series: Series) -> str:
    gain = last - first
    if gain > LEARNED_NOISES * error:
        answer = "Yes"
    elif gain < -LEARNED_NOISES * error:
        answer = "No, it got worse"
    else:
        answer = "Not to be told from noise"
    return (
        f"{answer}: {what} {first:.3f} at first, {last:.3f} at step {series.steps[-1]} ({gain:+.3f} ± "
        f"{LEARNED_NOISES * error:.3f})"
    )


def _fallen(run: RunRecord) -> str:
    collapse = find_collapse(run.series("reward/mean"))
    return (
        "" if collapse is None else f"; the reward had reached {collapse.peak:.3f} and fell from step {collapse.began}"
    )


def _evaluation_error(series: Series, num_prompts: int) -> float:
    """Standard error of the difference of two evaluations: problems are drawn once, samples of a problem go together."""
    variances = series.values[[0, -1]] * (1 - series.values[[0, -1]])
    return float(np.sqrt(np.maximum(variances, 0.0).sum() / num_prompts))


def _basename(path: object) -> str:
    return str(path).rstrip("/").rpartition("/")[2]
