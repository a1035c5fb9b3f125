"""What the bench says of its results: tables, what they were made with, and what moved since."""

import json
from pathlib import Path
from typing import Any

import pytest

from tools.bench.results import (
    aims,
    compare,
    document,
    has_section,
    markdown,
    number,
    provenance,
    read,
    replace_section,
    swings,
    versions,
    where_time_goes,
    write,
)


def row(*values: float, better: str = "higher", name: str = "speed", **held_against: float | None) -> dict[str, Any]:
    figure = {"name": name, "values": list(values), "better": better, "aim": None} | held_against
    return {"figures": [figure], "differences": {}, "swing": {}, "profile": [], "notes": []}


def test_rows_say_when_and_from_what_they_were_measured():
    made = {"date": "2026-01-02", "commit": "abc", "machine": "2 cores of X"}
    rows = {"loss": row(1.0) | {"made": made}, "packing": row(1.0), "routing": row(1.0) | {"made": made}}
    assert provenance(rows) == "Measured: loss, routing: 2026-01-02 at abc on 2 cores of X; packing: not recorded."


def test_what_older_files_recorded_still_reads():
    old = {"date": "2026-01-02", "commit": "abc", "rounds": 3}
    assert provenance({"loss": row(1.0) | {"made": old}}) == "Measured: loss: 2026-01-02 at abc."


def test_rows_say_the_versions_of_the_interpreters_that_ran_them():
    made = {"date": "2026-01-02", "commit": "abc", "versions": {"python": "3.11", "torch": "2"}}
    beside = made | {"peers": {"python": "3.11", "trl": "1"}}
    rows = {
        "loss": row(1.0) | {"made": made},
        "packing": row(1.0) | {"made": made},
        "step": row(1.0) | {"made": beside},
    }
    assert provenance(rows).endswith(
        "Versions: loss, packing: python 3.11, torch 2; step: python 3.11, torch 2 (peers: python 3.11, trl 1)."
    )


def test_versions_are_of_what_is_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tools.bench.results.PACKAGES", ("torch", "no-such-package"))
    assert versions().keys() == {"python", "torch"}


def test_comparing_names_what_moved_beyond_the_spread_of_both_runs():
    baseline = {"loss": row(2.0, 2.2, 2.4), "packing": row(0.5, 0.6, 0.7, better="lower")}
    assert "Nothing moved" in compare({"loss": row(2.1, 2.3, 2.9)}, baseline)
    assert compare({"loss": row(3.0, 3.1, 3.2)}, baseline).startswith("better: loss: speed: 2.2 (2 – 2.4) → 3.1")
    assert compare({"packing": row(0.8, 0.9, 1.0, better="lower")}, baseline).startswith("worse: packing")
    assert compare({"loss": row(2.2, name="memory")}, baseline) == "new: loss: memory\ngone: loss: speed"


def test_a_figure_whose_expected_value_is_fitted_anew_is_the_same_figure():
    before, now = (row(0.6, 0.8, expected=expected, margin=0.1) for expected in (0.71, 0.74))
    assert "Nothing moved" in compare({"growth": now}, {"growth": before})


def test_results_are_kept_row_by_row(tmp_path: Path):
    file = tmp_path / "made here" / "results.json"
    write(file, {"loss": row(1.0), "packing": row(2.0, expected=1.5, margin=0.1)})
    write(file, {"loss": row(1.23456789)})
    assert read(file) == {"loss": row(1.2346), "packing": row(2.0, expected=1.5, margin=0.1)}


def test_a_file_with_an_environment_of_all_its_rows_is_read_and_loses_it(tmp_path: Path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"environment": {"torch": "2"}, "rows": {"packing": row(2.0)}}))
    write(file, {"loss": row(1.0)})
    assert json.loads(file.read_text()) == {"rows": {"packing": row(2.0), "loss": row(1.0)}}


def test_the_table_says_whether_the_aim_is_reached_and_of_how_many_values():
    lines = markdown({"loss": row(0.9, 3.0, 8.25, aim=1.0), "packing": row(0.6, better="lower", aim=0.5)}).splitlines()
    assert lines[2] == "| loss | speed | 3 | 0.9 – 8.25 | 3 | yes (≥ 1) |"
    assert lines[3] == "| packing | speed | 0.6 | 0.6 – 0.6 | 1 | no (≤ 0.5) |"


@pytest.mark.parametrize(
    ("median", "margin", "verdict"),
    [
        (0.8, 0.1, "yes (0.71 ± 0.1)"),
        (0.82, 0.1, "no (0.71 ± 0.1)"),
        (0.6, 0.1, "no (0.71 ± 0.1)"),
        (9.0, None, "(0.71)"),
    ],
)
def test_an_expected_value_is_reached_from_both_sides(median: float, margin: float | None, verdict: str):
    line = markdown({"growth": row(0.0, median, 10.0, expected=0.71, margin=margin)}).splitlines()[2]
    assert line.endswith(f"| 3 | {verdict} |")


def test_the_short_table_has_all_that_is_held_against_something_and_marks_what_misses_it():
    rows = {
        "loss": row(3.0, aim=1.0),
        "packing": row(0.6, better="lower", aim=0.5),
        "routing": row(1.0),
        "growth": row(0.9, expected=0.71, margin=0.1),
        "weights": row(0.9, expected=0.71),
    }
    assert aims(rows).splitlines()[2:] == [
        "| loss: speed | 3 | ≥ 1 |",
        "| packing: speed | 0.6 | ≤ 0.5 **missed** |",
        "| growth: speed | 0.9 | 0.71 ± 0.1 **missed** |",
    ]


def test_swings_of_the_machine_are_said_of_the_rows_that_measured_them():
    swing = {"matrix product": 1.4512, "memory copy": 1.28}
    rows = {
        "loss": row(1.0) | {"swing": swing},
        "step": row(1.0),
        "packing": row(1.0) | {"swing": {"memory copy": 2.0}},
    }
    assert swings(rows) == (
        "Slowest over fastest round of the probes: loss 1.45 × (matrix product), 1.28 × (memory copy); "
        "packing 2 × (memory copy)."
    )
    assert swings({"step": row(1.0)}) == ""


def test_where_the_time_goes_is_said_of_the_largest_six_and_with_all_notes():
    profile = [[f"aten::op{i}_", 0.3 - 0.01 * i] for i in range(8)]
    rows = {
        "loss": row(1.0) | {"profile": profile, "notes": ["a save: __init__ 4%"]},
        "packing": row(1.0),
        "step": row(1.0) | {"notes": ["3 ranks"]},
        "copy": row(1.0) | {"profile": [["copy", 0.996], ["view", 0.004]]},
    }
    first, second, third = where_time_goes(rows).splitlines()[2:]
    assert first.startswith("- **loss**: `aten::op0_` 30%, `aten::op1_` 29%,")
    assert first.endswith(r" `aten::op5_` 25%; a save: \_\_init\_\_ 4%")  # not in bold
    assert (second, third) == ("- **step**: 3 ranks", "- **copy**: `copy` 100%")
    assert where_time_goes({"packing": row(1.0)}) == ""


def test_a_document_holds_the_table_and_how_it_came_about():
    rows = {"loss": row(1.0) | {"swing": {"memory copy": 2.0}, "notes": ["3 ranks"]}}
    assert document(rows).split("\n\n") == [
        markdown(rows),
        provenance(rows),
        swings(rows),
        *where_time_goes(rows).split("\n\n"),
    ]
    assert document({"loss": row(1.0)}).endswith("Measured: loss: not recorded.")


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (1234.5, "1230"), (0.98765, "0.988"), (12.0, "12"), (1e-7, "1.00e-07")]
)
def test_numbers_have_three_digits(value: float, text: str):
    assert number(value) == text


def test_the_table_takes_the_place_of_the_one_before_it(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- measured -->\nold\n<!-- /measured -->\nafter\n")
    assert has_section(page, "measured") and not has_section(page, "how fast")
    assert not has_section(tmp_path / "none.md", "measured")
    replace_section(page, "measured", "new")
    assert page.read_text() == "before\n<!-- measured -->\nnew\n<!-- /measured -->\nafter\n"
