"""A run's curves as one self-contained HTML page.

In: a run directory, of a running, finished or crashed run. Out: one HTML file with a panel a question (did it learn, how
much was clipped, how far did the policy move); the plotting library is inside the file, nothing is fetched.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from megatron_gspo.report.metrics import read_metrics
from megatron_gspo.types import UserError

# Two hues that stay apart without colour vision (Okabe and Ito, 2008), and a dash that tells them apart in grey.
STYLES = (("#0072B2", "solid"), ("#D55E00", "dash"))


@dataclass(frozen=True)
class Panel:
    """One question, and the metrics that answer it; names may end in `*`, which stands for the rest of a name."""

    title: str
    metrics: Mapping[str, str]  # metric name -> legend
    how_to_read: str
    logarithmic: bool = False


PANELS = (
    Panel(
        "Reward",
        {"reward/mean": "rollouts", "eval/*/pass_at_1": "held-out problems, pass@1 (dashed)"},
        "Mean reward of each step's rollouts, and the share of held-out problems solved by a sample.",
    ),
    Panel(
        "Clipped tokens",
        {"clip/token_fraction": "share of response tokens"},
        "Share of response tokens whose gradient the clip removed (Figure 2 of the paper).",
        logarithmic=True,
    ),
    Panel(
        "Spread of the importance ratio",
        {"ratio/token_log_std": "token, log w", "ratio/sequence_log_std": "sequence, log s (dashed)"},
        "Standard deviation of the log-ratios between new and old policy, by token (eq. 3) and by sequence (eq. 8).",
        logarithmic=True,
    ),
    Panel(
        "Entropy",
        {"entropy/mean": "nats a token"},
        "Mean entropy of the policy at response tokens: falls as it grows sure, rises when training falls apart.",
    ),
    Panel(
        "Gradient norm",
        {"grad_norm": "before clipping"},
        "Mean over the step's updates; spikes announce trouble.",
    ),
    Panel(
        "Response length",
        {"response/length_mean": "tokens"},
        "Mean tokens a response, the stop token included.",
    ),
)


def write_report(run: Path, output: Path | None = None) -> Path:
    """Draw the run in `run` into `output` (default: `report.html` in it), and return where it is.

    Raises:
        UserError: `run` holds no metrics yet, or `output` cannot be written.
    """
    if not (run / "metrics.jsonl").is_file():
        raise UserError(f"RUN: {run} holds no metrics.jsonl; give the --output-dir of a training run")
    steps = read_metrics(run)
    if not steps:
        raise UserError(f"RUN: {run / 'metrics.jsonl'} is still empty; the first step has not ended")
    output = output or run / "report.html"
    try:
        output.write_text(_page(run, steps))
    except OSError as error:
        raise UserError(f"--output: {output} cannot be written ({error.strerror}); accepted: a file's name") from error
    return output


def summary(steps: list[dict[str, float]]) -> str:
    """What a run came to, in one line: held-out pass@1 before and after, or reward where nothing was held out."""
    for name in sorted({name for step in steps for name in step if name.endswith("/pass_at_1")}):
        points = _points(steps, name)
        first, last = points[0], points[-1]
        return f"{name}: {first[1]:.3f} at step {first[0]:.0f}, {last[1]:.3f} at step {last[0]:.0f}"
    points = _points(steps, "reward/mean")
    return f"reward/mean: {points[0][1]:.3f} at first, {points[-1][1]:.3f} at the end" if points else "no reward yet"


def _page(run: Path, steps: list[dict[str, float]]) -> str:
    columns = 2
    rows = -(-len(PANELS) // columns)
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=[_title(panel) for panel in PANELS],
        horizontal_spacing=0.08,
        vertical_spacing=0.09,
    )
    for index, panel in enumerate(PANELS):
        row, column = index // columns + 1, index % columns + 1
        _draw(figure, panel, steps, row, column)
        figure.update_xaxes(title_text="step", row=row, col=column)
        if panel.logarithmic:
            figure.update_yaxes(type="log", dtick="D2", tickformat=".1g", row=row, col=column)
    figure.update_layout(
        height=340 * rows, template="simple_white", showlegend=False, margin={"t": 70, "l": 50, "r": 30}
    )
    title = html.escape(run.name)
    explanations = "".join(f"<dt>{panel.title}</dt><dd>{panel.how_to_read}</dd>" for panel in PANELS)
    chart = figure.to_html(full_html=False, include_plotlyjs=True, config={"displaylogo": False, "responsive": True})
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{title}</title><style>body{{font:16px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;"
        "padding:0 1rem}dt{font-weight:600}dd{margin:0 0 .5rem}</style></head><body>"
        f"<h1>{title}</h1><p>{html.escape(summary(steps))}. {len(steps)} lines of metrics.</p>{chart}"
        f"<h2>How to read these</h2><dl>{explanations}</dl></body></html>"
    )


def _title(panel: Panel) -> str:
    """The panel's title with its legend: each series in its own colour, where the eye already is."""
    legends = [
        f"<span style='color:{color}'>{legend}</span>"
        for legend, (color, _) in zip(panel.metrics.values(), STYLES, strict=False)
    ]
    return f"<b>{panel.title}</b>: {', '.join(legends)}"


def _draw(figure: go.Figure, panel: Panel, steps: list[dict[str, float]], row: int, column: int) -> None:
    for (pattern, legend), (color, dash) in zip(panel.metrics.items(), STYLES, strict=False):
        for name in _matching(pattern, steps):
            points = _points(steps, name)
            if not points:
                continue
            figure.add_trace(
                go.Scatter(
                    x=[step for step, _ in points],
                    y=[value for _, value in points],
                    mode="lines+markers" if len(points) < 60 else "lines",
                    line={"color": color, "dash": dash, "width": 2},
                    name=legend,
                    hovertemplate=f"{legend}: %{{y:.4g}}<extra>step %{{x}}</extra>",
                ),
                row=row,
                col=column,
            )


def _matching(pattern: str, steps: Iterable[Mapping[str, float]]) -> list[str]:
    start, star, end = pattern.partition("*")
    names = sorted({name for step in steps for name in step})
    return [name for name in names if (name.startswith(start) and name.endswith(end) if star else name == pattern)]


def _points(steps: Iterable[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    return [(step["step"], step[name]) for step in steps if step.get(name) is not None]
