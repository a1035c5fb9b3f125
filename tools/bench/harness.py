"""Measures two or more ways of doing the same thing so that a noisy machine cannot decide between them.

In: functions that do the same work. Out: a `RowResult`: ratios, one a round, with what they are held against, the
largest difference between what the sides computed, how far the machine itself swung, and where our side's time went.

Every round runs all sides in order and then in reverse (A B B A), so that a machine that slows down steadily slows all
of them alike, and a ratio compares times of one round only. What computes is timed by the processor time it takes, so
that other programs' turns on a shared machine do not count; what waits for a disk or another process, by the clock on
the wall. Times themselves are not reported on a CPU.
"""

from __future__ import annotations

import cProfile
import gc
import pstats
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from tools.bench.results import SMALLEST_SHARE

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Figure:
    """A ratio, measured once a round, and what it should come to: an aim, an expected value, or neither.

    The name is the same in every run, as runs are compared by it: a fitted number is `expected`, no part of the name.
    """

    name: str
    values: tuple[float, ...]
    better: Better
    aim: float | None = None  # at least (where higher is better) or at most
    expected: float | None = None  # what a documented formula gives
    margin: float | None = None  # by how much the median may differ from `expected`, up or down; None: by any

    def __post_init__(self) -> None:
        assert self.values, f"{self.name} was never measured"
        assert self.aim is None or self.expected is None, f"{self.name} has an aim and an expected value"
        assert self.margin is None or self.expected is not None, f"{self.name} has a margin of nothing"


@dataclass(frozen=True)
class Times:
    """Seconds of every side, one entry a round: of its two turns in that round, together."""

    seconds: Mapping[str, Sequence[float]]

    def ratio(self, side: str, to: str, scale: float = 1.0) -> tuple[float, ...]:
        """`scale` × the time of `side` over that of `to`, round by round."""
        pairs = zip(self.seconds[side], self.seconds[to], strict=True)
        return tuple(scale * numerator / denominator for numerator, denominator in pairs)


@dataclass
class RowResult:
    """What a row came to."""

    figures: list[Figure] = field(default_factory=list)
    differences: dict[str, float] = field(default_factory=dict)  # largest |difference| between sides, by what
    swing: dict[str, float] = field(default_factory=dict)  # slowest over fastest round of each probe
    profile: list[tuple[str, float]] = field(default_factory=list)  # operator, its share of our side's time
    notes: list[str] = field(default_factory=list)
    series: dict[str, dict[str, list[Any]]] = field(default_factory=dict)  # what a picture is drawn from, by its panel


class DifferentResultsError(Exception):
    """The sides of a row did not compute the same, so that comparing their times would mean nothing."""


class Bench:
    """What a row measures with."""

    def __init__(self, rounds: int) -> None:
        assert rounds > 0, "a row is measured at least once"
        self.rounds = rounds
        self.result = RowResult()
        self._probes: dict[str, Callable[[], object]] = {}
        self._probe_seconds: dict[str, list[float]] = {}

    def alternate(
        self,
        sides: Mapping[str, Callable[[], object]],
        *,
        rounds: int | None = None,
        clock: Callable[[], float] = time.process_time,
    ) -> Times:
        """Time `sides` in strict alternation, a matrix product and a memory copy beside them as probes of the machine.

        Every side runs once before the clock starts. `rounds` is the command line's where it is None; `clock` gives
        seconds, this process's time on processors or another's.
        """
        rounds = self.rounds if rounds is None else rounds
        if clock is time.process_time:
            seconds = alternate(dict(sides) | machine_probes(), rounds, clock)
        else:  # which does not tell what this process computes
            seconds = alternate(sides, rounds, clock) | alternate(machine_probes(), rounds)
        for probe in machine_probes():
            self._swung(probe, seconds.pop(probe))
        return Times(seconds)

    def probe_machine(self) -> None:
        """Time each probe of the machine once: for a row whose sides cannot take turns in `alternate`.

        Call it once in every round. The swing is then the slowest over the fastest call of the row, in processor time.
        """
        if not self._probes:
            self._probes = machine_probes()
            for probe in self._probes.values():
                probe()  # once before the clock starts, as sides do
        for name, probe in self._probes.items():
            started = time.process_time()
            probe()
            self._probe_seconds.setdefault(name, []).append(time.process_time() - started)
            self._swung(name, self._probe_seconds[name])

    def _swung(self, probe: str, seconds: Sequence[float]) -> None:
        """Keep the largest swing of a probe in this row."""
        self.result.swing[probe] = max(max(seconds) / min(seconds), self.result.swing.get(probe, 1.0))

    def figure(
        self,
        name: str,
        values: Sequence[float],
        *,
        better: Better,
        aim: float | None = None,
        expected: float | None = None,
        margin: float | None = None,
    ) -> None:
        """Report a ratio, beside an `aim` or beside what a formula says is `expected`, give or take `margin`."""
        self.result.figures.append(Figure(name, tuple(values), better, aim, expected, margin))

    def same(self, what: str, ours: torch.Tensor, theirs: torch.Tensor, *, tolerance: float) -> None:
        """Hold two results against each other.

        Args:
            ours, theirs: of one shape, finite.
            tolerance: of the largest difference, relative to the largest magnitude of `theirs`.

        Raises:
            DifferentResultsError: they differ by more, or one is not finite.
        """
        if ours.shape != theirs.shape:
            raise DifferentResultsError(f"{what}: shapes are {tuple(ours.shape)} and {tuple(theirs.shape)}")
        scale = float(theirs.detach().double().abs().max())
        difference = float((ours.detach().double() - theirs.detach().double()).abs().max())
        if scale == 0:
            raise DifferentResultsError(f"{what}: all of it is 0, which says nothing")
        if not difference <= tolerance * scale:  # NaN is not either
            raise DifferentResultsError(f"{what}: the sides differ by {difference:.3g}; values go up to {scale:.3g}")
        self.result.differences[what] = difference / scale

    def identical(self, what: str, ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
        """Hold named tensors against each other, bit by bit.

        Raises:
            DifferentResultsError: a name, shape, dtype or bit differs, or there is nothing to compare.
        """
        if not ours or ours.keys() != theirs.keys():
            raise DifferentResultsError(f"{what}: {len(ours)} and {len(theirs)} tensors, or of other names")
        for name, tensor in ours.items():
            other = theirs[name]
            if tensor.dtype != other.dtype or tensor.shape != other.shape:
                raise DifferentResultsError(f"{what}: {name} is {tensor.dtype} {list(tensor.shape)} on one side only")
            if not torch.equal(tensor.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)):
                raise DifferentResultsError(f"{what}: {name} differs")
        self.result.differences[what] = 0.0

    def profile(self, ours: Callable[[], object], *, repeats: int = 3, top: int = 8) -> None:
        """Note which operators our side's time goes to."""
        ours()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            for _ in range(repeats):
                ours()
        events = profiler.key_averages()
        total = sum(event.self_cpu_time_total for event in events)
        largest = sorted(events, key=lambda event: -event.self_cpu_time_total)[:top]
        self.result.profile = [(event.key, event.self_cpu_time_total / total) for event in largest]

    def note(self, text: str) -> None:
        """Say something about the row that is no ratio."""
        self.result.notes.append(text)


def alternate(
    sides: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Seconds of each side in every round, of its two turns together: sides in order, then in reverse."""
    for side in sides.values():
        side()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    there = list(sides)
    for _ in range(rounds):
        spent = dict.fromkeys(there, 0.0)
        gc.collect()
        gc.disable()
        try:
            for name in [*there, *reversed(there)]:
                started = clock()
                sides[name]()
                spent[name] += clock() - started
        finally:
            gc.enable()
        for name, total in spent.items():
            seconds[name].append(total)
    return seconds


def calls(run: Callable[[], object], top: int = 5) -> str:
    """Where this thread's time on the wall goes in `run`, by function; those that would read 0% are left out."""
    profiler = cProfile.Profile(time.perf_counter)
    profiler.runcall(run)
    spent: dict[str, float] = {}
    for (_, _, name), (_, _, own, *_) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        spent[name] = spent.get(name, 0.0) + own
    total = sum(spent.values())
    largest = sorted(spent.items(), key=lambda item: -item[1])[:top]
    return ", ".join(
        f"{name.strip('<>').removeprefix('built-in method ').removeprefix('builtins.')} {s / total:.0%}"
        for name, s in largest
        if s >= SMALLEST_SHARE * total
    )


def copy_probe(num_bytes: int) -> Callable[[], object]:
    """Copies `num_bytes` of memory: reads that much and writes that much."""
    source = torch.ones(num_bytes // 4)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def product_probe(rows: int, inner: int, columns: int) -> Callable[[], object]:
    """Multiplies [rows, inner] by [inner, columns] in float32: 2 · rows · inner · columns operations."""
    left, right = torch.rand(rows, inner), torch.rand(inner, columns)
    out = torch.empty(rows, columns)
    return lambda: torch.mm(left, right, out=out)


def machine_probes() -> dict[str, Callable[[], object]]:
    """The same two for every row, so that swings of different rows compare."""
    return {"matrix product": product_probe(512, 512, 512), "memory copy": copy_probe(2**25)}
