"""Growth: a training step at 1×, 2×, 4× and 8× the tokens, experts, layers and ranks.

Time is processor time of the rank that takes most, memory its peak beyond the program. Beside each the formula: bytes as
`megatron_gspo.memory` reckons them, and seconds as operations of matrix products, parameters updated, layers and a
constant, at costs fitted to the sizes on one rank, and bytes that leave a rank, at the cost that two ranks show; for four
and eight the formula is a prediction. So for bytes in memory: a factor for what the allocator cannot use again, and what is
there at any size. The ranks share the 8-fold tokens and the experts on two cores, so only what each computes is measured,
not how long they wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from tools.bench.growing import AXES, Growing, Size, exponent, fitted
from tools.bench.harness import Bench, Times

FACTORS = (1, 2, 4, 8)
BASE = Size()
#: By how much an exponent may exceed the formula's.
MARGIN = 0.1


def measure(bench: Bench) -> None:
    """All sizes in turns."""
    sizes = {axis: along(axis) for axis in AXES}
    running = {size: Growing(size) for size in dict.fromkeys(size for line in sizes.values() for size in line)}
    check_losses(bench, [running[size] for size in sizes["ranks"]])
    spent = 0.0

    def step(growing: Growing) -> None:
        nonlocal spent
        spent += growing.step()

    sides: dict[str, Callable[[], object]] = {str(size): partial(step, growing) for size, growing in running.items()}
    times = bench.alternate(sides, clock=lambda: spent)
    peaks = {size: growing.close() for size, growing in running.items()}
    seconds = {size: float(np.median(times.seconds[str(size)])) / 2 for size in running}  # two turns a round
    alone = [size for size in running if size.ranks == 1]
    costs = fitted([size.causes() for size in alone], [seconds[size] for size in alone])
    on_a_rank = {size: float(np.dot(size.causes(), costs)) for size in running}
    of_two = next(size for size in running if size.ranks == 2)
    a_byte = max(0.0, seconds[of_two] - on_a_rank[of_two]) / of_two.exchanged_bytes()
    by_formula = {size: on_a_rank[size] + a_byte * size.exchanged_bytes() for size in running}
    factor, fixed = fitted([(size.bytes(), 1.0) for size in alone], [peaks[size] for size in alone])
    bytes_by_formula = {size: factor * size.bytes() + fixed for size in running}
    for axis, line in sizes.items():
        report(bench, axis, line, times, peaks, by_formula, bytes_by_formula)
    bench.note(f"peak of memory: {factor:.2f} × the reckoned bytes and {fixed / 2**20:.0f} MiB")
    worst = max(abs(bytes_by_formula[size] / peaks[size] - 1) for size in alone)
    bench.note(f"the formula's largest error in memory on one rank: {worst:.0%}")
    shares = np.array(BASE.causes()) * costs / by_formula[BASE]
    names = ("products", "parameters", "layers", "constant")
    bench.note("time at 1×, by formula: " + ", ".join(f"{n} {s:.0%}" for n, s in zip(names, shares, strict=True)))
    worst = max(abs(by_formula[size] / seconds[size] - 1) for size in alone)
    bench.note(f"the formula's largest error in time on one rank: {worst:.0%}")


def along(axis: str) -> list[Size]:
    """The sizes of one axis."""
    if axis == "ranks":
        return [replace(BASE, tokens=FACTORS[-1] * BASE.tokens, ranks=ranks) for ranks in FACTORS]
    return [replace(BASE, **{axis: factor * getattr(BASE, axis)}) for factor in FACTORS]


def check_losses(bench: Bench, of_ranks: Sequence[Growing]) -> None:
    """However many ranks share them, the responses are as likely."""
    first, *others = of_ranks
    for other in others:
        name = f"mean log-prob on {other.size.ranks} ranks and on one"
        bench.same(
            name,
            torch.tensor(other.loss, dtype=torch.float64),
            torch.tensor(first.loss, dtype=torch.float64),
            tolerance=1e-4,
        )


def report(
    bench: Bench,
    axis: str,
    line: Sequence[Size],
    times: Times,
    peaks: dict[Size, float],
    by_formula: dict[Size, float],
    bytes_by_formula: dict[Size, float],
) -> None:
    """The exponents of one axis, and the values it is drawn from, all beside those at 1×."""
    factors = [getattr(size, axis) / getattr(line[0], axis) for size in line]
    by_round = [list(values) for values in zip(*(times.seconds[str(size)] for size in line), strict=True)]
    expected = exponent(factors, [by_formula[size] for size in line])
    found = [exponent(factors, values) for values in by_round]
    bench.figure(f"{axis}: exponent of time (formula {expected:.2f})", found, better="lower", aim=expected + MARGIN)
    taken, reckoned = [peaks[size] for size in line], [bytes_by_formula[size] for size in line]
    expected, found = exponent(factors, reckoned), [exponent(factors, taken)]
    bench.figure(f"{axis}: exponent of memory (formula {expected:.2f})", found, better="lower", aim=expected + MARGIN)
    bench.result.series[axis] = {
        "factors": factors,
        "time": [[value / values[0] for value in values] for values in by_round],
        "time by formula": [by_formula[size] / by_formula[line[0]] for size in line],
        "memory": [value / taken[0] for value in taken],
        "memory by formula": [value / reckoned[0] for value in reckoned],
    }
