"""Figures of expert volatility from `volatility/step_*.npz` (docs/volatility.md says what the arrays hold).

In: a run's files of counts. Out: the heat map over layers and steps, profiles over depth and over the response, the flow
between experts, and the margin's reliability curve. Counts of several steps are added up before anything is divided.
"""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_gspo.report.figure import (
    COLORS,
    DASHES,
    MAX_HEATMAP_COLUMNS,
    SYMBOLS,
    Figure,
    bin_means,
    compact,
    last_of_bins,
    number,
)
from megatron_gspo.report.read import RunRecord
from megatron_gspo.types import UserError

MAX_FILES = 48  # read and added up, evenly over the run; a file of a large model takes milliseconds
FEWEST_IN_BIN = 10  # token-layers that a margin's share is drawn from
CHANGE = "change_rate"
FIRST_UPDATE = "change_rate_after_update_1"
FLOOR = "noise_floor_repacked"


@dataclass(frozen=True, eq=False)
class RoutingCounts:
    """Counts of one comparison, added up over the files read. Shapes as in docs/volatility.md."""

    layers: np.ndarray  # [L]
    tokens: np.ndarray  # [L, 16, K + 1]
    load_old: np.ndarray  # [L, E]
    lost: np.ndarray  # [L, E]
    gained: np.ndarray  # [L, E]
    margin_edges: np.ndarray  # [M - 1]
    margin_tokens: np.ndarray  # [L, M, 2]

    def rate_by_layer(self) -> np.ndarray:
        """c of each layer, [L]; NaN where no token was counted."""
        return _rate(self.tokens.sum(1))

    def rate_by_position(self) -> np.ndarray:
        """c of each sixteenth of the response, mean over layers, [16]."""
        return _rate(self.tokens.sum(0))


def routing_figures(run: RunRecord) -> list[Figure]:
    """All figures that the run's files allow; none where nothing was kept."""
    figures = [figure for figure in (heat_map(run),) if figure is not None]
    files = run.volatility_files()
    if not files:
        return figures
    chosen = [files[index] for index in np.unique(np.linspace(0, len(files) - 1, MAX_FILES).round().astype(int))]
    counts = read_counts([path for _, path in chosen])
    note = f"Counts of {len(chosen):,} of {len(files):,} measured steps, {chosen[0][0]} to {chosen[-1][0]}, added up."
    if CHANGE in counts and counts[CHANGE].tokens.any():
        depth = [
            (label, counts[name].layers, counts[name].rate_by_layer()) for name, label in PROFILES if name in counts
        ]
        position = [
            (label, (np.arange(16) + 0.5) / 16, counts[name].rate_by_position())
            for name, label in PROFILES
            if name in counts
        ]
        figures += [
            _profile("depth", "Change over depth", "MoE layer", depth, DEPTH_WORDS),
            _profile("position", "Change over the response", "position in the response", position, POSITION_WORDS),
            expert_flow(counts[CHANGE]),
        ]
        reliability = margin_reliability(counts[CHANGE])
        figures += [] if reliability is None else [reliability]
    return figures[:1] + [replace(figure, note=note) for figure in figures[1:]]


PROFILES = (
    (CHANGE, "after all of the step's updates"),
    (FIRST_UPDATE, "after one update"),
    (FLOOR, "noise floor, repacked"),
)
DEPTH_WORDS = (
    "The paper finds the change more salient in deeper models: a rise to the right is drift that adds up over layers.",
    "c = 1 - |E_old ∩ E_new| / K in each MoE layer, over response tokens of the probe (§5.3).",
)
POSITION_WORDS = (
    "A rise to the right says that later tokens, which attend to more changed states, are rerouted more.",
    "c by sixteenth of the response, mean over MoE layers; 0 is its first token (§5.3).",
)


def read_counts(files: list[Path]) -> dict[str, RoutingCounts]:
    """The counts of `PROFILES`' comparisons, added up over `files`; a comparison that no file has is absent.

    Raises:
        UserError: a file is broken.
    """
    total: dict[str, RoutingCounts] = {}
    for file in files:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                found = {name: _counts(arrays, name) for name, _ in PROFILES if f"{name}/tokens" in arrays}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{file} is broken: {error}; accepted: a file that `train` wrote, or none") from error
        for name, counts in found.items():
            total[name] = _added(total[name], counts) if name in total else counts
    return total


def heat_map(run: RunRecord) -> Figure | None:
    """The change rate of each layer and step, from metrics.jsonl."""
    names = run.matching("routing/change_rate_layer_*")
    layers = sorted(int(name.rpartition("_")[2]) for name in names if name.rpartition("_")[2].isdigit())
    if not layers:
        return None
    series = [run.series(f"routing/change_rate_layer_{layer}") for layer in layers]
    steps = np.unique(np.concatenate([line.steps for line in series]))
    rates = np.full((len(layers), len(steps)), np.nan)
    for row, line in enumerate(series):
        rates[row, np.searchsorted(steps, line.steps)] = line.values
    per_bin = math.ceil(len(steps) / MAX_HEATMAP_COLUMNS)
    shown = bin_means(rates, per_bin)
    mean_by_layer = np.nanmean(rates, axis=1)
    most, least = int(np.argmax(mean_by_layer)), int(np.argmin(mean_by_layer))
    return Figure(
        id="heat_map",
        title="Change rate, layers × steps",
        how_to_read="Bright rows are layers that never settle; a bright column is a step that moved the whole model.",
        definition="c = 1 - |E_old ∩ E_new| / K after all of the step's updates, on the probe, by MoE layer (§5.3).",
        description=(
            f"Heat map of the change rate of {len(layers)} MoE layers over steps {steps[0]} to {steps[-1]}. On average it is "
            f"highest in layer {layers[most]}, {mean_by_layer[most]:.2%}, and lowest in layer {layers[least]}, "
            f"{mean_by_layer[least]:.2%}."
        ),
        traces=[
            {
                "type": "heatmap",
                "name": "change rate",
                "x": last_of_bins(steps, per_bin).tolist(),
                "y": layers,
                "z": compact(shown),
                "colorscale": "Viridis",
                "colorbar": {"thickness": 12, "tickformat": "~%"},
                "hovertemplate": "step %{x}, layer %{y}: %{z:.3%}<extra></extra>",
            }
        ],
        layout={"xaxis": {"title": {"text": "step"}}, "yaxis": {"title": {"text": "MoE layer"}, "tickformat": "d"}},
        note=f"Each column is the mean of {per_bin} measured steps." if per_bin > 1 else "",
    )


def expert_flow(counts: RoutingCounts) -> Figure:
    """Which experts lose tokens and which gain them, in each layer."""
    load = counts.load_old.astype(float)
    net = np.divide(counts.gained - counts.lost, load, out=np.full_like(load, np.nan), where=load > 0)
    balance = counts.gained - counts.lost
    winner = np.unravel_index(int(balance.argmax()), balance.shape)
    loser = np.unravel_index(int(balance.argmin()), balance.shape)
    limit = float(np.nanpercentile(np.abs(net), 98)) or 1e-9
    return Figure(
        id="expert_flow",
        title="Experts that gain and lose tokens",
        how_to_read="Red experts gained tokens over the step's updates, blue ones lost them; a pale map is churn that evens out.",
        definition="(tokens gained - tokens lost) / tokens held under the old policy, by MoE layer and expert (§5.3).",
        description=(
            f"Heat map of the net flow of tokens, {balance.shape[0]} MoE layers × {balance.shape[1]} experts. Expert "
            f"{winner[1]} of layer {counts.layers[winner[0]]} gained most, {balance[winner]:+,} of {int(load[winner]):,} "
            f"tokens; expert {loser[1]} of layer {counts.layers[loser[0]]} lost most, {balance[loser]:+,} of "
            f"{int(load[loser]):,}."
        ),
        traces=[
            {
                "type": "heatmap",
                "name": "net flow",
                "x": list(range(balance.shape[1])),
                "y": counts.layers.tolist(),
                "z": compact(net),
                "colorscale": "RdBu",
                "zmid": 0,
                "zmin": -limit,
                "zmax": limit,
                "colorbar": {"thickness": 12, "tickformat": "+~%"},
                "hovertemplate": "layer %{y}, expert %{x}: %{z:+.2%}<extra></extra>",
            }
        ],
        layout={
            "xaxis": {"title": {"text": "expert"}},
            "yaxis": {"title": {"text": "MoE layer"}, "tickformat": "d"},
        },
    )


def margin_reliability(counts: RoutingCounts) -> Figure | None:
    """How often a decision of a given router margin changed. None where margins are unknown."""
    tokens = counts.margin_tokens.sum(0)  # [M, 2]
    known = np.flatnonzero(tokens.sum(1) >= FEWEST_IN_BIN)
    if len(known) == 0:
        return None
    edges = counts.margin_edges.astype(float)
    factor = np.sqrt(edges[1] / edges[0])  # bins of equal width in log10; the open ends take their neighbours' width
    centers = np.concatenate([[edges[0] / factor], edges * factor])[known]
    share = tokens[known, 1] / tokens[known].sum(1)
    total = tokens[known].sum(1)
    half = centers[np.searchsorted(np.cumsum(tokens[known, 1]), tokens[known, 1].sum() / 2)]
    return Figure(
        id="margin",
        title="Does a small margin foretell a change?",
        how_to_read="A curve that falls from left to right says that close decisions flip and clear ones stay.",
        definition="Share of token-layers whose set of experts changed, by the old policy's K-th minus K+1-th router "
        f"score; bins of at least {FEWEST_IN_BIN}.",
        description=(
            f"Reliability curve over {len(known)} bins of the router margin, {int(total.sum()):,} token-layers: "
            f"{share[0]:.1%} changed at the smallest margins, about {number(centers[0])}, and {share[-1]:.1%} at the "
            f"largest, about {number(centers[-1])}; half of all changes are at margins up to {number(half)}."
        ),
        traces=[
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": "share changed",
                "x": compact(centers),
                "y": compact(share),
                "customdata": total.tolist(),
                "line": {"color": COLORS[0], "width": 2},
                "marker": {"color": COLORS[0], "size": 6},
                "hovertemplate": "margin %{x:.2g}: %{y:.2%} of %{customdata:,} token-layers<extra></extra>",
            }
        ],
        layout={
            "xaxis": {
                "title": {"text": "router margin under the old policy"},
                "type": "log",
                "exponentformat": "power",
            },
            "yaxis": {"title": {"text": "share changed"}, "tickformat": "~%", "rangemode": "tozero"},
        },
    )


def _profile(
    id: str, title: str, x_title: str, curves: list[tuple[str, np.ndarray, np.ndarray]], words: tuple[str, str]
) -> Figure:
    sentences = []
    for label, all_x, all_rates in curves:
        counted = np.isfinite(all_rates)  # a short response has no token in some sixteenths
        x, rates = all_x[counted], all_rates[counted]
        if len(rates) == 0:
            continue
        sentences.append(
            f"{label}: {rates[0]:.2%} at {x_title} {number(float(x[0]))}, {rates[-1]:.2%} at {number(float(x[-1]))}, "
            f"highest {rates.max():.2%} at {number(float(x[int(rates.argmax())]))}"
        )
    return Figure(
        id=id,
        title=title,
        how_to_read=words[0],
        definition=words[1],
        description=f"{title}, lines. {'; '.join(sentences)}.",
        traces=[
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": label,
                "x": compact(x.astype(float)),
                "y": compact(rates),
                "line": {"color": COLORS[position], "dash": DASHES[position], "width": 2},
                "marker": {"color": COLORS[position], "symbol": SYMBOLS[position], "size": 7},
                "hovertemplate": "%{y:.3%}",
            }
            for position, (label, x, rates) in enumerate(curves)
        ],
        layout={
            "xaxis": {"title": {"text": x_title}},
            "yaxis": {"title": {"text": "change rate"}, "tickformat": "~%", "rangemode": "tozero"},
            "hovermode": "x unified",
        },
    )


def _counts(arrays: np.lib.npyio.NpzFile, name: str) -> RoutingCounts:
    def array(part: str) -> np.ndarray:
        return arrays[f"{name}/{part}"]

    return RoutingCounts(
        layers=array("layer"),
        tokens=array("tokens"),
        load_old=array("load_old"),
        lost=array("lost"),
        gained=array("gained"),
        margin_edges=array("margin_edges"),
        margin_tokens=array("margin_tokens"),
    )


def _added(one: RoutingCounts, other: RoutingCounts) -> RoutingCounts:
    return RoutingCounts(
        layers=one.layers,
        tokens=one.tokens + other.tokens,
        load_old=one.load_old + other.load_old,
        lost=one.lost + other.lost,
        gained=one.gained + other.gained,
        margin_edges=one.margin_edges,
        margin_tokens=one.margin_tokens + other.margin_tokens,
    )


def _rate(tokens: np.ndarray) -> np.ndarray:
    """Mean c of counts [..., K + 1] by number of experts replaced; NaN where there is no token."""
    top_k = tokens.shape[-1] - 1
    replaced = (tokens * np.arange(top_k + 1)).sum(-1).astype(float)
    total = tokens.sum(-1).astype(float) * top_k
    return np.divide(replaced, total, out=np.full_like(total, np.nan), where=total > 0)
