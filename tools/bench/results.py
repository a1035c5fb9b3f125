"""What was measured, as a table, as JSON and beside an earlier measurement.

In: the rows' results. Out: text. Imports neither PyTorch nor this project, as `run.py` reads its arguments with it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: row -> what `child.py` wrote of it
Rows = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Summary:
    """A figure as it is printed and kept."""

    row: str
    name: str
    median: float
    low: float
    high: float
    better: str
    aim: float | None

    @property
    def verdict(self) -> str:
        """Whether the median reaches the aim."""
        if self.aim is None:
            return ""
        met = self.median >= self.aim if self.better == "higher" else self.median <= self.aim
        return f"{'yes' if met else 'no'} ({'≥' if self.better == 'higher' else '≤'} {number(self.aim)})"


def summaries(rows: Rows) -> list[Summary]:
    """All figures of all rows, in order."""
    return [
        Summary(
            row=row,
            name=figure["name"],
            median=statistics.median(figure["values"]),
            low=min(figure["values"]),
            high=max(figure["values"]),
            better=figure["better"],
            aim=figure["aim"],
        )
        for row, result in rows.items()
        for figure in result["figures"]
    ]


def number(value: float) -> str:
    """Three significant digits, without an exponent where one can do without."""
    if value == 0 or 1e-4 <= abs(value) < 1e5:
        digits = f"{value:.3g}"
        return f"{float(digits):.0f}" if "e" in digits else digits
    return f"{value:.2e}"


def markdown(rows: Rows) -> str:
    """The table: a line a figure."""
    lines = ["| row | figure | median | min – max | aim reached |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {s.row} | {s.name} | {number(s.median)} | {number(s.low)} – {number(s.high)} | {s.verdict} |"
        for s in summaries(rows)
    ]
    return "\n".join(lines)


def details(rows: Rows) -> str:
    """What belongs beside the table: differences between the sides, swings of the machine, profiles and notes."""
    lines: list[str] = []
    for row, result in rows.items():
        lines.append(f"{row}:")
        if result["differences"]:
            worst = ", ".join(f"{what} {number(value)}" for what, value in result["differences"].items())
            lines.append(f"  largest relative differences: {worst}")
        if result["swing"]:
            swing = ", ".join(f"{probe} {number(value)} ×" for probe, value in result["swing"].items())
            lines.append(f"  slowest over fastest round of the probes: {swing}")
        if result["profile"]:
            shares = ", ".join(f"{name} {share:.0%}" for name, share in result["profile"])
            lines.append(f"  where our time goes: {shares}")
        lines += [f"  {note}" for note in result["notes"]]
    return "\n".join(lines)


def provenance(rows: Rows) -> str:
    """When and where each row was measured, in how many rounds and at which commit, by what `run.py` wrote beside it."""
    said: dict[str, list[str]] = {}
    for row, result in rows.items():
        made = result.get("made")
        how = "not recorded"
        if made:
            where = f" on {made['machine']}" if "machine" in made else ""
            how = f"{made['date']} at {made['commit']}, {made['rounds']} rounds{where}"
        said.setdefault(how, []).append(row)
    return "Measured: " + "; ".join(f"{', '.join(names)}: {how}" for how, names in said.items()) + "."


def compare(rows: Rows, baseline: Rows) -> str:
    """What moved: figures whose median lies outside the baseline's range while the baseline's lies outside theirs."""
    before = {(s.row, s.name): s for s in summaries(baseline)}
    now = {(s.row, s.name): s for s in summaries(rows)}
    lines = [line for key, summary in now.items() if key in before and (line := moved(summary, before[key]))]
    lines += [f"new: {row}: {name}" for row, name in now if (row, name) not in before]
    lines += [f"gone: {row}: {name}" for row, name in before if row in rows and (row, name) not in now]
    return "\n".join(lines) or "Nothing moved beyond the spread of its rounds."


def moved(now: Summary, before: Summary) -> str | None:
    """How a figure moved; None where the rounds of both overlap."""
    if before.low <= now.median <= before.high or now.low <= before.median <= now.high:
        return None
    improved = (now.median > before.median) == (now.better == "higher")
    return (
        f"{'better' if improved else 'worse'}: {now.row}: {now.name}: {number(before.median)} "
        f"({number(before.low)} – {number(before.high)}) → {number(now.median)} ({number(now.low)} – {number(now.high)})"
    )


def read(path: Path) -> dict[str, Any]:
    """The rows of a file that `write` made."""
    rows: dict[str, Any] = json.loads(path.read_text())["rows"]
    return rows


def write(path: Path, rows: Rows, environment: Mapping[str, object]) -> None:
    """Keep `rows` in `path`; rows that it holds already and that were not measured now stay."""
    kept = read(path) if path.is_file() else {}
    content = {"environment": environment, "rows": kept | _rounded(rows)}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _rounded(rows: Rows) -> dict[str, Any]:
    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.5g}")
        if isinstance(value, Mapping):
            return {key: rounded(entry) for key, entry in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [rounded(entry) for entry in value]
        return value

    return {row: rounded(result) for row, result in rows.items()}


def replace_section(document: Path, section: str, text: str) -> None:
    """Put `text` between `<!-- section -->` and `<!-- /section -->` in `document`."""
    before, opened, rest = document.read_text().partition(f"<!-- {section} -->\n")
    _, closed, after = rest.partition(f"<!-- /{section} -->")
    assert opened and closed, f"{document} has no section {section}"
    document.write_text(f"{before}{opened}{text}\n{closed}{after}")
