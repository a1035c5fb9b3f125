"""Draws how time and memory grow: `python -m tools.bench.picture RESULTS PNG`.

In: the row `growth` of a file that `run.py --json` wrote. Out: a panel an axis, values beside those at 1×.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_gspo.report.figure import COLORS
from tools.bench import results

TIME, MEMORY = COLORS[0], COLORS[1]


def draw(series: dict[str, dict[str, Any]], path: Path) -> None:
    """Measured values as points, time with the range of its rounds; the formula's as lines."""
    mpl.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True})
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots(1, len(series))
    for axis, (name, values) in zip(axes, series.items(), strict=True):
        panel(axis, name, values)
    axes[0].set_ylabel("beside 1×")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=100)


def panel(axis: Axes, name: str, values: dict[str, Any]) -> None:
    """One axis of growth, on logarithmic scales."""
    factors, rounds = np.array(values["factors"]), np.array(values["time"])
    middle = np.median(rounds, axis=0)
    swing = np.abs([middle - rounds.min(axis=0), rounds.max(axis=0) - middle])
    axis.plot(factors, values["time by formula"], "-", color=TIME, label="time, formula")
    axis.errorbar(factors, middle, swing, fmt="o", color=TIME, capsize=3, label="processor time a rank")
    axis.plot(factors, values["memory by formula"], "--", color=MEMORY, label="memory, formula")
    axis.plot(factors, values["memory"], "s", color=MEMORY, label="peak of tensors a rank")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(factors, [f"{factor:g}×" for factor in factors])
    every = np.concatenate([rounds.ravel(), values["memory"], values["time by formula"], values["memory by formula"]])
    exponents = range(int(np.floor(np.log2(every.min()))), int(np.ceil(np.log2(every.max()))) + 1)
    axis.set_yticks([2.0**e for e in exponents], [f"{2.0**e:g}×" for e in exponents])
    axis.set_title(name)


if __name__ == "__main__":
    draw(results.read(Path(sys.argv[1]))["growth"]["series"], Path(sys.argv[2]))
