"""Growth: a training step at 1×, 2×, 4× and 8× the tokens, experts, layers and ranks.

Time is processor time, the mean of the ranks; memory the bytes of the fullest rank's tensors at a step's peak. Beside each
the formula. Bytes are as `megatron_gspo.memory` reckons them, and nothing is fitted to them. Seconds are operations of
matrix products, parameters updated, layers and a constant, at costs fitted to the sizes on one rank; and, among ranks,
the peers that a rank exchanges with, at a cost fitted to the numbers of ranks.

The ranks share the 8-fold tokens and the experts on two cores, so only what each computes is measured, not how long
they wait. Processes that run at once slow each other down in caches and memory, whatever they compute: eight run at
every number of ranks, eight of one rank or one of eight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from tools.bench.growing import AXES, Growing, Size, exponent, fitted
from tools.bench.harness import Bench

FACTORS = (1, 2, 4, 8)
BASE = Size()
#: By how much an exponent may differ from the formula's, up or down.
MARGIN = 0.1


def measure(bench: Bench) -> None:
    """All sizes in turns."""
    lines = {axis: along(axis) for axis in AXES}
    shared = {size: Growing(size, worlds=FACTORS[-1] // size.ranks) for size in lines["ranks"]}
    check_log_probs(bench, list(shared.values()))
    sizes = dict.fromkeys(size for axis in AXES if axis != "ranks" for size in lines[axis])
    alone = {size: Growing(size) for size in sizes}
    spent = 0.0

    def step(growing: Growing) -> None:
        nonlocal spent
        spent += growing.step()

    running = {f"{axis}: {size}": (shared if axis == "ranks" else alone)[size] for axis in AXES for size in lines[axis]}
    # What stands on several axes takes one turn, under the name of the first.
    names = {growing: name for name, growing in reversed(running.items())}
    times = bench.alternate({name: partial(step, growing) for growing, name in names.items()}, clock=lambda: spent)
    seconds = {growing: [both / 2 for both in times.seconds[name]] for growing, name in names.items()}  # of two turns
    peaks = {growing: growing.peak_bytes() for growing in names}
    for growing in names:
        growing.close()
    medians = {growing: float(np.median(values)) for growing, values in seconds.items()}
    costs = fitted([size.causes() for size in alone], [medians[growing] for growing in alone.values()])
    by_formula = {size: float(np.dot(size.causes(), costs)) for size in alone}
    by_formula_at_once = formula_of_ranks(costs, {size: medians[growing] for size, growing in shared.items()})
    for axis, line in lines.items():
        of_axis = [running[f"{axis}: {size}"] for size in line]
        rounds = list(zip(*(seconds[growing] for growing in of_axis), strict=True))
        on_axis = [(by_formula_at_once if axis == "ranks" else by_formula)[size] for size in line]
        reckoned = [growing.size.bytes(growing.load) for growing in of_axis]
        report(bench, axis, line, rounds, on_axis, [peaks[growing] for growing in of_axis], reckoned)
    over = [growing.size.bytes(growing.load) / peak - 1 for growing, peak in peaks.items()]
    bench.note(f"bytes by formula, nothing fitted, over those measured: {min(over):+.0%} to {max(over):+.0%}")
    shares = np.array(BASE.causes()) * costs / by_formula[BASE]
    causes = ("products", "parameters", "layers", "constant")
    bench.note("time at 1×, by formula: " + ", ".join(f"{n} {s:.0%}" for n, s in zip(causes, shares, strict=True)))
    on_one, on_several = (
        max(abs(formula[size] / medians[growing] - 1) for size, growing in each.items())
        for formula, each in ((by_formula, alone), (by_formula_at_once, shared))
    )
    bench.note(f"the formula's largest error in time: {on_one:.0%} on one rank, {on_several:.0%} among ranks")


def formula_of_ranks(costs: np.ndarray, seconds: Mapping[Size, float]) -> dict[Size, float]:
    """Seconds by formula, where eight processes run at once and took `seconds`.

    What a rank computes times one factor, plus one cost a peer; both are fitted to all of `seconds`.
    """
    causes = [(float(np.dot(size.causes(), costs)), size.ranks - 1.0) for size in seconds]
    slower_and_a_peer = fitted(causes, list(seconds.values()))
    return {size: float(np.dot(each, slower_and_a_peer)) for size, each in zip(seconds, causes, strict=True)}


def along(axis: str) -> list[Size]:
    """The sizes of one axis."""
    if axis == "ranks":
        return [replace(BASE, tokens=FACTORS[-1] * BASE.tokens, ranks=ranks) for ranks in FACTORS]
    return [replace(BASE, **{axis: factor * getattr(BASE, axis)}) for factor in FACTORS]


def check_log_probs(bench: Bench, of_ranks: Sequence[Growing]) -> None:
    """However many ranks share them, the responses are as likely."""
    first, *others = of_ranks
    for other in others:
        name = f"mean log-prob on {other.size.ranks} ranks and on one"
        ours, theirs = (torch.tensor(each.mean_log_prob, dtype=torch.float64) for each in (other, first))
        bench.same(name, ours, theirs, tolerance=1e-4)


def report(
    bench: Bench,
    axis: str,
    line: Sequence[Size],
    seconds: Sequence[Sequence[float]],
    seconds_by_formula: Sequence[float],
    peaks: Sequence[int],
    reckoned: Sequence[int],
) -> None:
    """The exponents of one axis, and the values it is drawn from, all beside those at 1×.

    Args:
        seconds: [rounds, sizes].
        peaks: bytes, [sizes].
        reckoned: bytes by formula, [sizes].
    """
    factors = [getattr(size, axis) / getattr(line[0], axis) for size in line]
    expected = exponent(factors, seconds_by_formula)
    found = [exponent(factors, values) for values in seconds]
    # Among ranks two costs are fitted to the four values: their slope cannot but be near, and is held to nothing.
    margin = None if axis == "ranks" else MARGIN
    bench.figure(f"{axis}: exponent of time", found, better="lower", expected=expected, margin=margin)
    expected, found = exponent(factors, reckoned), [exponent(factors, peaks)]
    bench.figure(f"{axis}: exponent of memory", found, better="lower", expected=expected, margin=MARGIN)
    bench.result.series[axis] = {
        "factors": factors,
        "time": [[value / values[0] for value in values] for values in seconds],
        "time by formula": [value / seconds_by_formula[0] for value in seconds_by_formula],
        "memory": [value / peaks[0] for value in peaks],
        "memory by formula": [value / reckoned[0] for value in reckoned],
    }
