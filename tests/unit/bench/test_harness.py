"""The bench measures ratios that noise cannot turn, refuses sides that differ, and says what moved."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tools.bench.harness import Bench, DifferentResultsError, Figure, Times, alternate, calls
from tools.bench.results import compare, markdown, number, provenance, read, replace_section, write


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


def row(*values: float, better: str = "higher", aim: float | None = None, name: str = "speed") -> dict:
    figure = {"name": name, "values": list(values), "better": better, "aim": aim}
    return {"figures": [figure], "differences": {}, "swing": {}, "profile": [], "notes": []}


def test_sides_take_turns_there_and_back_so_that_a_steady_slow_down_cancels():
    machine = SlowingMachine()
    sides = {"a": machine.work("a", 1.0), "b": machine.work("b", 1.0), "c": machine.work("c", 2.0)}
    seconds = alternate(sides, rounds=2, clock=lambda: machine.now)
    assert machine.order == ["a", "b", "c"] + 2 * ["a", "b", "c", "c", "b", "a"]  # once before the clock starts
    assert Times(seconds).ratio("a", "b") == pytest.approx((1.0, 1.0))
    assert Times(seconds).ratio("c", "a") == pytest.approx((2.0, 2.0))
    assert seconds["a"][1] > seconds["a"][0]


def test_a_share_is_what_a_side_takes_beyond_another():
    times = Times({"with": [1.1, 2.2], "without": [1.0, 2.0], "whole": [10.0, 10.0]})
    assert times.less("with", "without", "whole") == pytest.approx((0.01, 0.02))


def test_a_figure_reaches_its_aim_by_its_median_and_in_its_direction():
    assert Figure("f", (0.5, 2.0, 3.0), "higher", aim=2.0).met is True
    assert Figure("f", (0.5, 1.9, 3.0), "higher", aim=2.0).met is False
    assert Figure("f", (0.5, 1.9, 3.0), "lower", aim=2.0).met is True
    assert Figure("f", (0.5,), "lower").met is None


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


def test_rows_say_when_and_from_what_they_were_measured():
    made = {"date": "2026-01-02", "commit": "abc", "rounds": 3}
    rows = {"loss": row(1.0) | {"made": made}, "packing": row(1.0), "routing": row(1.0) | {"made": made}}
    assert provenance(rows) == ("Measured: loss, routing: 2026-01-02 at abc, 3 rounds; packing: not recorded.")


def test_comparing_names_what_moved_beyond_the_spread_of_both_runs():
    baseline = {"loss": row(2.0, 2.2, 2.4), "packing": row(0.5, 0.6, 0.7, better="lower")}
    assert "Nothing moved" in compare({"loss": row(2.1, 2.3, 2.9)}, baseline)
    assert compare({"loss": row(3.0, 3.1, 3.2)}, baseline).startswith("better: loss: speed: 2.2 (2 – 2.4) → 3.1")
    assert compare({"packing": row(0.8, 0.9, 1.0, better="lower")}, baseline).startswith("worse: packing")
    assert compare({"loss": row(2.2, name="memory")}, baseline) == "new: loss: memory\ngone: loss: speed"


def test_results_are_kept_row_by_row(tmp_path: Path):
    file = tmp_path / "results.json"
    write(file, {"loss": row(1.0), "packing": row(2.0)}, {"torch": "2"})
    write(file, {"loss": row(1.23456789)}, {"torch": "2"})
    assert read(file) == {"loss": row(1.2346), "packing": row(2.0)}
    assert json.loads(file.read_text())["environment"] == {"torch": "2"}


def test_the_table_says_whether_the_aim_is_reached():
    lines = markdown({"loss": row(0.9, 3.0, 8.25, aim=1.0), "packing": row(0.6, better="lower", aim=0.5)}).splitlines()
    assert lines[2] == "| loss | speed | 3 | 0.9 – 8.25 | yes (≥ 1) |"
    assert lines[3] == "| packing | speed | 0.6 | 0.6 – 0.6 | no (≤ 0.5) |"


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (1234.5, "1230"), (0.98765, "0.988"), (12.0, "12"), (1e-7, "1.00e-07")]
)
def test_numbers_have_three_digits(value: float, text: str):
    assert number(value) == text


def test_the_table_takes_the_place_of_the_one_before_it(tmp_path: Path):
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- measured -->\nold\n<!-- /measured -->\nafter\n")
    replace_section(document, "measured", "new")
    assert document.read_text() == "before\n<!-- measured -->\nnew\n<!-- /measured -->\nafter\n"
