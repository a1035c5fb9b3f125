"""The study's PNGs. In: results. Out: files, and for each the words that say how to read it.

What tells lines apart is never colour alone; the colours are Okabe and Ito's (2008). Bands and bars are 95% bootstrap
intervals over replicates. A figure whose runs have not ended is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from megatron_gspo.report.figure import COLORS
from megatron_gspo.report.statistics import bootstrap_band
from tools.reproduce.answers import MARGIN, Answer, Verdict
from tools.reproduce.intervals import mean_of
from tools.reproduce.measure import Outcome, Results
from tools.reproduce.routing_rules import AFTER_ONE, change_by_depth
from tools.reproduce.study import ARMS, LEARNING_RATES, MODELS

DPI = 100
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "D", "^", "v", "P")
TOKEN, SEQUENCE = COLORS[1], COLORS[0]


@dataclass(frozen=True)
class Picture:
    """A PNG that was written."""

    file: str
    claims: tuple[str, ...]  # the numbers of the claims it bears on
    caption: str


def draw_all(results: Results, answers: dict[str, Answer], directory: Path) -> list[Picture]:
    """Draw every figure that the results allow."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in directory.glob("*.png"):
        file.unlink()  # of an earlier analysis, which may have drawn what this one does not
    mpl.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True})
    makers: tuple[Callable[[Results, dict[str, Answer]], tuple[Figure, Picture] | None], ...] = (
        _learning_curves,
        _learning_rates,
        _clip_fractions,
        _differences,
        _depth,
        _decomposition,
        _engine,
    )
    pictures = []
    for make in makers:
        made = make(results, answers)
        if made is None:
            continue
        figure, picture = made
        figure.savefig(directory / picture.file, dpi=DPI, bbox_inches="tight", metadata={"Software": None})
        pictures.append(picture)
    return pictures


def _learning_curves(results: Results, answers: dict[str, Answer]) -> tuple[Figure, Picture] | None:
    del answers
    names = [name for name in ("common", "best", "off_policy") if _arms_with_runs(results, name)]
    if not names:
        return None
    figure, axes = _panels(len(names))
    for axis, name in zip(axes, names, strict=True):
        for index, (arm, runs) in enumerate(_arms_with_runs(results, name).items()):
            curves = np.stack([run.reward for run in runs])
            _curve(axis, index, f"{ARMS[arm].title} ({len(runs)})", np.arange(1, curves.shape[1] + 1), curves)
        axis.set(title=results.experiments[name].title, xlabel="step", ylim=(0, 1))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(fontsize=7)
    axes[0].set_ylabel("mean reward of the step")
    caption = "Mean over replicates (their number in brackets), in a bootstrap band. Higher sooner is more efficient."
    return figure, Picture("learning_curves.png", ("1", "3"), caption)


def _learning_rates(results: Results, answers: dict[str, Answer]) -> tuple[Figure, Picture] | None:
    del answers
    names = [name for name in ("sweep", "dense") if _arms_with_runs(results, name)]
    if not names:
        return None
    figure, axes = _panels(len(names))
    for axis, name in zip(axes, names, strict=True):
        for index, arm in enumerate(_arms_with_runs(results, name)):
            by_rate = {rate: list(results.of(name, arm, rate=rate).values()) for rate in LEARNING_RATES}
            rates = [rate for rate, runs in by_rate.items() if runs]
            means = [np.mean([run.end_reward for run in by_rate[rate]]) for rate in rates]
            shift = 1 + 0.015 * (index - 2)
            axis.plot(np.array(rates) * shift, means, label=ARMS[arm].title, markersize=5, **_look(index))
            for rate in rates:
                points = [run.end_reward for run in by_rate[rate]]
                axis.plot([rate * shift] * len(points), points, ".", color=COLORS[index], markersize=3)
        start = float(np.mean([run.start for runs in _arms_with_runs(results, name).values() for run in runs]))
        axis.axhline(start, color="black", linewidth=0.8, linestyle=":")
        axis.text(LEARNING_RATES[0], start + 0.01, "where they started", fontsize=7)
        axis.set(title=results.experiments[name].title, xlabel="learning rate", xscale="log", ylim=(0, 1))
        axis.set_xticks(LEARNING_RATES, [f"{rate:g}" for rate in LEARNING_RATES], fontsize=7)
        axis.minorticks_off()
        axis.legend(fontsize=7)
    axes[0].set_ylabel("mean reward, last quarter")
    caption = (
        "Line: mean over the two tuning replicates, which are the dots. Below the dotted line a run has collapsed."
    )
    return figure, Picture("learning_rates.png", ("1", "3"), caption)


def _clip_fractions(results: Results, answers: dict[str, Answer]) -> tuple[Figure, Picture] | None:
    del answers
    arms = _arms_with_runs(results, "common") | _arms_with_runs(results, "clip")
    if not {"gspo", "grpo"} <= set(arms):
        return None
    figure, (axis,) = _panels(1)
    shown = [arm for arm in ("gspo", "grpo", "grpo_tight", "gspo_wide") if arm in arms]
    for index, arm in enumerate(shown):
        curves = np.stack([run.record.series("clip/token_fraction").values for run in arms[arm] if run.status == 0])
        steps = np.arange(1, curves.shape[1] + 1)
        axis.plot(steps, curves.mean(0), label=f"{ARMS[arm].title} ({len(curves)})", markersize=4, **_look(index))
    axis.set(xlabel="step", ylabel="clipped tokens, share", ylim=(0, 1.1))
    axis.set_yscale("symlog", linthresh=1e-4)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(fontsize=7)
    caption = (
        "Share of response tokens whose gradient the clip removed (Figure 2), mean over replicates; linear below 1e-4."
    )
    return figure, Picture("clip_fractions.png", ("2",), caption)


def _differences(results: Results, answers: dict[str, Answer]) -> tuple[Figure, Picture] | None:
    del results
    rows = [
        (f"{claim}  {label}", estimate)
        for claim, answer in answers.items()
        if answer.verdict != Verdict.OPEN
        for label, estimate in answer.estimates.items()
        if " − " in label
    ]
    if not rows:
        return None
    figure = Figure(figsize=(7.5, 0.8 + 0.32 * len(rows)))
    axis = figure.subplots()
    axis.axvspan(-MARGIN, MARGIN, color="0.9")
    axis.axvline(0, color="black", linewidth=0.8)
    for row, (_, estimate) in enumerate(rows):
        axis.plot([estimate.low, estimate.high], [row, row], color=COLORS[0], linewidth=2.5)
        if estimate.student_low is not None and estimate.student_high is not None:
            axis.plot([estimate.student_low, estimate.student_high], [row, row], color=COLORS[0], linewidth=0.8)
        axis.plot(estimate.value, row, "o", color=COLORS[1], markersize=5)
    axis.set_yticks(range(len(rows)), [f"{label}  (n={estimate.count})" for label, estimate in rows], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("paired difference in reward")
    caption = (
        f"Thick: bootstrap interval; thin: Student's. Grey: differences below {MARGIN}, which count as none. An interval "
        "that leaves the grey on the right is an advantage; one that lies left of its right edge rules one out."
    )
    return figure, Picture("differences.png", ("1", "3", "6"), caption)


def _depth(results: Results, answers: dict[str, Answer]) -> tuple[Figure, Picture] | None:
    del answers
    metrics = {AFTER_ONE: "after one update", "routing/change_rate": "after the step's four"}
    found = {label: change_by_depth(results, metric) for metric, label in metrics.items()}
    profiles = _profiles(results)
    if not found["after one update"] or not profiles:
        return None
    figure, (left, right) = _panels(2)
    for index, (label, rates) in enumerate(found.items()):
        layers = [depth for depth, values in rates.items() if values]
        means = [mean_of(list(rates[depth].values())) for depth in layers]
        errors = [[mean.value - mean.low for mean in means], [mean.high - mean.value for mean in means]]
        left.errorbar(layers, [mean.value for mean in means], yerr=errors, label=label, capsize=3, **_look(index))
    left.axhspan(0.05, 0.20, color="0.9")
    left.text(2, 0.1, "the paper's “about 10%”, 48 layers", fontsize=7)
    left.set(xlabel="MoE layers", ylabel="activated experts that change", xscale="log", yscale="log")
    left.set(xlim=(1.6, 20), ylim=(1e-3, 0.4))
    left.set_xticks([2, 4, 8, 16], ["2", "4", "8", "16"])
    left.set_yticks([0.001, 0.003, 0.01, 0.03, 0.1, 0.3], ["0.1%", "0.3%", "1%", "3%", "10%", "30%"])
    left.minorticks_off()
    left.legend(fontsize=7)
    for index, (num_layers, profile) in enumerate(profiles.items()):
        numbers = np.arange(1, len(profile) + 1)
        right.plot(numbers, profile, label=f"{num_layers} layers", markersize=4, **_look(index))
    right.set(xlabel="layer", title="by layer, after the step's four")
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.legend(fontsize=7)
    caption = (
        "Left: change rate of GRPO at the common learning rate, mean and interval over replicates. Right: the same by "
        "layer; a rise to the right is drift that adds up."
    )
    return figure, Picture("depth.png", ("4",), caption)


def _profiles(results: Results) -> dict[int, np.ndarray]:
    """Change rate of each layer after a step's updates, by the model's depth: [layers]."""
    profiles = {}
    for name, model in MODELS.items():
        experiment = "common" if name == "moe_8" else "depth"
        runs = list(results.of(experiment, "grpo", model=name).values())
        if runs and not model.dense:
            layers = range(1, model.layers + 1)
            rates = [[run.mean(f"routing/change_rate_layer_{layer}") for layer in layers] for run in runs]
            profiles[model.layers] = np.mean(rates, axis=0)
    return dict(sorted(profiles.items()))


def _decomposition(results: Results, answers: dict[str, Answer]) -> tuple[Figure, Picture] | None:
    del answers
    runs = list(results.of("common", "grpo").values())
    if not runs:
        return None
    figure, (left, right) = _panels(2)
    parts = {"replayed_variance": "weights", "routing_variance": "routing", "routing_covariance": "both together"}
    for index, unit in enumerate(("token", "sequence")):
        means = [mean_of([run.mean(f"ratio/{unit}_{part}_share") for run in runs]) for part in parts]
        places = np.arange(len(parts)) + 0.2 * (2 * index - 1)
        errors = [[mean.value - mean.low for mean in means], [mean.high - mean.value for mean in means]]
        label, color = (("token, log w", TOKEN), ("sequence, log s", SEQUENCE))[index]
        hatch = ("", "//")[index]
        left.bar(
            places, [mean.value for mean in means], 0.38, yerr=errors, label=label, color=color, hatch=hatch, capsize=3
        )
    left.set_xticks(range(len(parts)), list(parts.values()))
    left.set(ylabel="share of the variance")
    left.legend(fontsize=7)
    spreads = {
        "token, rerouted": ("ratio/token_log_std_changed", TOKEN),
        "token, others": ("ratio/token_log_std_unchanged", TOKEN),
        "token, all": ("ratio/token_natural_log_std", TOKEN),
        "token, replayed": ("ratio/token_replayed_log_std", TOKEN),
        "sequence, all": ("ratio/sequence_natural_log_std", SEQUENCE),
        "sequence, replayed": ("ratio/sequence_replayed_log_std", SEQUENCE),
    }
    means = [mean_of([run.mean(metric) for run in runs]) for metric, _ in spreads.values()]
    right.barh(range(len(spreads)), [mean.value for mean in means], color=[color for _, color in spreads.values()])
    right.set_yticks(range(len(spreads)), list(spreads), fontsize=8)
    right.invert_yaxis()
    right.set(xlabel="standard deviation of the log-ratio")
    figure.subplots_adjust(wspace=0.55)
    caption = (
        "GRPO at the common learning rate, on the probe. Left: what moves a log-ratio (the three shares sum to 1). Right: "
        "how wide log-ratios are spread. Averaging independent tokens narrows the spread and leaves the shares."
    )
    return figure, Picture("decomposition.png", ("5",), caption)


def _engine(results: Results, answers: dict[str, Answer]) -> tuple[Figure, Picture] | None:
    del answers
    arms = _arms_with_runs(results, "engine")
    if not arms:
        return None
    figure, (left, right) = _panels(2)
    for index, (arm, runs) in enumerate(arms.items()):
        curves = np.stack([run.reward for run in runs])
        _curve(left, index, f"{ARMS[arm].title} ({len(runs)})", np.arange(1, curves.shape[1] + 1), curves)
        unit = "sequence" if arm.startswith("gspo") else "token"
        spread = np.mean([run.mean(f"mismatch/{unit}_log_std") for run in runs])
        width = np.mean([float(run.record.field("objective.clip_low")) for run in runs])
        clipped = np.mean([run.mean("clip/token_fraction") for run in runs])
        right.plot(width / spread, clipped, MARKERS[index], color=COLORS[index], markersize=8)
    left.set(xlabel="step", ylabel="mean reward of the step", ylim=(0, 1))
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(fontsize=6)
    right.axvline(1, color="black", linewidth=0.8, linestyle=":")
    right.margins(y=0.2)
    right.set_ylim(bottom=0)
    right.set(xscale="log", xlabel="lower clip range over the mismatch's spread", ylabel="clipped tokens, share")
    caption = (
        "bfloat16 engine, float32 trainer. Right, same markers: left of the dotted line the clip range is narrower than what "
        "engine and trainer differ by at equal weights; where the ratio is against the engine the loss then clips on noise."
    )
    return figure, Picture("engine.png", ("6",), caption)


def _arms_with_runs(results: Results, experiment: str) -> dict[str, list[Outcome]]:
    found = results.experiments.get(experiment)
    arms = {arm: list(results.of(experiment, arm).values()) for arm in (found.arms if found else ())}
    return {arm: runs for arm, runs in arms.items() if runs}


def _panels(number: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(1.2 + 3.9 * number, 3.4))
    axes = figure.subplots(1, number, squeeze=False)[0]
    figure.subplots_adjust(wspace=0.3)
    return figure, list(axes)


def _curve(axis: Axes, index: int, label: str, steps: np.ndarray, curves: np.ndarray) -> None:
    axis.plot(steps, curves.mean(0), label=label, markersize=3, **_look(index))
    band = bootstrap_band(curves)
    if band is not None:
        axis.fill_between(steps, *band, color=COLORS[index], alpha=0.12, linewidth=0)


def _look(index: int) -> dict[str, Any]:
    return {"color": COLORS[index], "linestyle": DASHES[index % len(DASHES)], "marker": MARKERS[index % len(MARKERS)]}
