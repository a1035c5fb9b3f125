"""The bench measures ratios that noise cannot turn, refuses sides that differ, and probes the machine beside them."""

import math
import time
from collections.abc import Callable

import pytest
import torch

from tools.bench import harness
from tools.bench.harness import Bench, DifferentResultsError, Figure, Times, alternate, calls


class SlowingMachine:
    """A clock of a machine on which everything takes longer the later it is."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def work(self, name: str, amount: float) -> Callable[[], None]:
        def side() -> None:
            self.order.append(name)
            self.now += amount * (1 + 0.1 * len(self.order))

        return side


def test_sides_take_turns_there_and_back_so_that_a_steady_slow_down_cancels():
    machine = SlowingMachine()
    sides = {"a": machine.work("a", 1.0), "b": machine.work("b", 1.0), "c": machine.work("c", 2.0)}
    seconds = alternate(sides, rounds=2, clock=lambda: machine.now)
    assert machine.order == ["a", "b", "c"] + 2 * ["a", "b", "c", "c", "b", "a"]  # once before the clock starts
    assert Times(seconds).ratio("a", "b") == pytest.approx((1.0, 1.0))
    assert Times(seconds).ratio("c", "a") == pytest.approx((2.0, 2.0))
    assert seconds["a"][1] > seconds["a"][0]


def test_the_machine_is_probed_from_outside_and_its_largest_swing_kept(monkeypatch: pytest.MonkeyPatch):
    machine, amounts = SlowingMachine(), iter([9.0, 2.0, 3.0, 1.0])

    def probe() -> None:
        machine.now += next(amounts)

    monkeypatch.setattr(harness, "machine_probes", lambda: {"memory copy": probe})
    monkeypatch.setattr(time, "process_time", lambda: machine.now)
    bench, swings = Bench(rounds=3), []
    for _ in range(3):
        bench.probe_machine()
        swings.append(bench.result.swing["memory copy"])
    assert swings == [1.0, 1.5, 3.0]  # of 2, 3 and 1 seconds; the 9 are before the clock starts


def test_a_figure_is_held_against_an_aim_or_an_expected_value():
    bench = Bench(rounds=1)
    bench.figure("exponent", [0.7], better="lower", expected=0.71, margin=0.1)
    assert bench.result.figures == [Figure("exponent", (0.7,), "lower", None, 0.71, 0.1)]
    with pytest.raises(AssertionError, match="an aim and an expected value"):
        bench.figure("exponent", [0.7], better="lower", aim=0.8, expected=0.71)
    with pytest.raises(AssertionError, match="a margin of nothing"):
        bench.figure("exponent", [0.7], better="lower", margin=0.1)


@pytest.mark.parametrize("wrong", [1.1, math.nan, math.inf])
def test_sides_that_compute_something_else_are_refused(wrong: float):
    bench = Bench(rounds=1)
    bench.same("values", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0 + 1e-6]), tolerance=1e-5)
    assert 0 < bench.result.differences["values"] < 1e-6
    with pytest.raises(DifferentResultsError, match="gradient"):
        bench.same("gradient", torch.tensor([wrong, 2.0]), torch.tensor([1.0, 2.0]), tolerance=1e-2)


def test_results_of_nothing_but_zeros_are_no_agreement():
    with pytest.raises(DifferentResultsError, match="all of it is 0"):
        Bench(rounds=1).same("gradient", torch.zeros(3), torch.zeros(3), tolerance=1.0)


def test_tensors_are_identical_by_name_dtype_shape_and_bit():
    bench, ours = Bench(rounds=1), {"a": torch.tensor([1.0, math.nan]), "b": torch.zeros(2)}
    bench.identical("weights", ours, {name: tensor.clone() for name, tensor in ours.items()})
    assert bench.result.differences == {"weights": 0.0}
    others = (
        {},
        {"a": ours["a"]},
        ours | {"b": torch.zeros(2, dtype=torch.float64)},
        ours | {"b": torch.zeros(1, 2)},
        ours | {"b": torch.tensor([0.0, -0.0])},
    )
    for other in others:
        with pytest.raises(DifferentResultsError, match="weights"):
            bench.identical("weights", ours, other)


def test_the_time_of_a_thread_is_said_by_function():
    assert calls(lambda: sorted(range(200_000), key=lambda value: -value)).startswith("sorted ")


def test_functions_that_take_nothing_are_left_out():
    assert " 0%" not in calls(lambda: sorted(range(200_000), key=lambda value: -value), top=100)
