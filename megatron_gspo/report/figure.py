"""A figure: plotly traces and layout as plain data, with the words that go with it.

In: series of numbers. Out: `Figure`. What tells lines apart is never colour alone: each has its own dash and marker too.
The colours are Okabe and Ito's (2008), which stay apart without colour vision; the page maps them to lighter ones where
the reader prefers dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_gspo.report.read import Series

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "triangle-down", "pentagon")
FILL_PATTERNS = ("", "/", "x", "-", ".", "\\", "+", "|")

MAX_POINTS = 2000
MAX_HEATMAP_COLUMNS = 300


@dataclass(frozen=True)
class Figure:
    """One figure of a page."""

    id: str  # of its element, and its CSV file's name
    title: str
    how_to_read: str  # one sentence
    definition: str  # with the paper's equation or section
    description: str  # what it shows, in words: the text alternative
    traces: list[dict[str, Any]]
    layout: dict[str, Any]
    note: str = ""  # what was left out or averaged


@dataclass(frozen=True, eq=False)
class Line:
    """One line of a figure over steps, with a band about it where there is one."""

    label: str
    series: Series
    band: tuple[np.ndarray, np.ndarray] | None = None  # low and high, [n] each


@dataclass(frozen=True)
class Axis:
    """What is on the vertical axis."""

    title: str
    logarithmic: bool = False
    share: bool = False  # shown in percent


def line_traces(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Each line in its own colour, dash and marker; its band below it."""
    traces: list[dict[str, Any]] = []
    for number, line in enumerate(lines):
        series, band = binned(line.series, line.band)
        color = COLORS[number % len(COLORS)]
        if band is not None:
            traces += _band_traces(series, band, line.label, color)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": line.label,
                "x": series.steps.tolist(),
                "y": compact(series.values),
                "line": {"color": color, "dash": DASHES[number % len(DASHES)], "width": 2},
                # A few markers tell lines apart; one a point would hide them.
                "marker": {"color": color, "symbol": SYMBOLS[number % len(SYMBOLS)], "size": 7, "maxdisplayed": 12},
                "hovertemplate": "%{y:.4g}",
            }
        )
    return traces


def line_figure(
    id: str, title: str, lines: Sequence[Line], axis: Axis, *, how_to_read: str, definition: str, x_title: str = "step"
) -> Figure:
    """A figure of lines over steps. On a logarithmic axis values of 0 cannot be drawn, which the note then says."""
    notes = []
    drawn_steps = max(len(line.series) for line in lines)
    if drawn_steps > MAX_POINTS:
        notes.append(f"Each point is the mean of {math.ceil(drawn_steps / MAX_POINTS)} steps.")
    zeros = {line.label: int((line.series.values <= 0).sum()) for line in lines} if axis.logarithmic else {}
    # Nothing but zeros is a straight line at 0, not an empty figure.
    logarithmic = axis.logarithmic and any((line.series.values > 0).any() for line in lines)
    if logarithmic and any(zeros.values()):
        listed = ", ".join(f"{label} at {count}" for label, count in zeros.items() if count)
        notes.append(f"A logarithmic axis has no 0: not drawn are {listed} steps.")
    y_axis: dict[str, Any] = {"title": {"text": axis.title}}
    if logarithmic:
        # Every decade where there are many; else 1, 2 and 5 of each, or what plotly finds within a part of one.
        decades = _decades(lines)
        ticks = {"dtick": 1} if decades > 2 else {"dtick": "D2", "tickformat": "~g"} if decades > 0.6 else {}
        y_axis |= {"type": "log", **ticks}
    if axis.share:
        y_axis |= {"tickformat": "~%"}
    return Figure(
        id=id,
        title=title,
        how_to_read=how_to_read,
        definition=definition,
        description=describe_lines(title, lines, x_title),
        traces=line_traces(lines),
        layout={"xaxis": {"title": {"text": x_title}}, "yaxis": y_axis, "hovermode": "x unified"},
        note=" ".join(notes),
    )


def describe_lines(title: str, lines: Sequence[Line], x_title: str = "step") -> str:
    """What the lines show: where each begins, ends, and is highest and lowest."""
    sentences = []
    for line in lines:
        values, steps = line.series.values, line.series.steps
        sentences.append(
            f"{line.label}: {number(values[0])} at {x_title} {steps[0]}, {number(values[-1])} at {x_title} {steps[-1]}, "
            f"lowest {number(values.min())} and highest {number(values.max())}"
        )
    return f"{title}, lines over {x_title}s. {'; '.join(sentences)}."


def binned(
    series: Series, band: tuple[np.ndarray, np.ndarray] | None = None
) -> tuple[Series, tuple[np.ndarray, np.ndarray] | None]:
    """At most `MAX_POINTS` points: means of equally many neighbouring steps, at the last step of each."""
    per_bin = math.ceil(len(series) / MAX_POINTS)
    if per_bin <= 1:
        return series, band
    means = bin_means(series.values, per_bin)
    binned_series = Series(last_of_bins(series.steps, per_bin), means)
    return binned_series, None if band is None else (bin_means(band[0], per_bin), bin_means(band[1], per_bin))


def bin_means(values: np.ndarray, per_bin: int) -> np.ndarray:
    """Means over the last axis of `per_bin` neighbours; the last bin may hold fewer. NaN is left out of a mean."""
    starts = np.arange(0, values.shape[-1], per_bin)
    counts = np.add.reduceat(np.isfinite(values).astype(float), starts, axis=-1)
    sums = np.add.reduceat(np.nan_to_num(values), starts, axis=-1)
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def last_of_bins(steps: np.ndarray, per_bin: int) -> np.ndarray:
    """The last of every `per_bin` steps."""
    ends = np.minimum(np.arange(per_bin, len(steps) + per_bin, per_bin), len(steps))
    return steps[ends - 1]


def compact(values: np.ndarray) -> list[Any]:
    """Numbers with six digits as JSON takes them, nested as `values` is; what is not finite is null."""
    if values.ndim > 1:
        return [compact(row) for row in values]
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]


def number(value: float) -> str:
    """A number as a person reads it: three significant digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _decades(lines: Sequence[Line]) -> float:
    positive = np.concatenate([line.series.values[line.series.values > 0] for line in lines])
    return float(np.log10(positive.max() / positive.min()))


def _band_traces(series: Series, band: tuple[np.ndarray, np.ndarray], label: str, color: str) -> list[dict[str, Any]]:
    shared: Mapping[str, Any] = {
        "type": "scatter",
        "mode": "lines",
        "x": series.steps.tolist(),
        "line": {"width": 0, "color": color},
        "showlegend": False,
        "hoverinfo": "skip",
    }
    filled = {"fill": "tonexty", "fillcolor": f"{color}33"}  # a fifth opaque
    return [
        {**shared, "name": f"{label}, low", "y": compact(band[0])},
        {**shared, **filled, "name": f"{label}, high", "y": compact(band[1])},
    ]
