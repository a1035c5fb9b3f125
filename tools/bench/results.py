"""What was measured, as tables, as JSON and beside an earlier measurement.

In: the rows' results. Out: text. Imports neither PyTorch nor this project, as `run.py` reads its arguments with it.
"""

from __future__ import annotations

import json
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

#: row -> what `child.py` wrote of it, and what `run.py` added
Rows = Mapping[str, Mapping[str, Any]]
PACKAGES = ("torch", "transformers", "megatron-core", "numpy", "trl", "verl")
TOP_OF_PROFILE = 6  # operators in the documents
SMALLEST_SHARE = 0.005  # what is less would read 0%


@dataclass(frozen=True)
class Summary:
    """A figure as it is printed and kept; what stands in files that know no `expected` reads as None."""

    row: str
    name: str
    rounds: int
    median: float
    low: float
    high: float
    better: str
    aim: float | None
    expected: float | None
    margin: float | None

    @property
    def spread(self) -> str:
        """The median and the range of its rounds."""
        return f"{number(self.median)} ({number(self.low)} – {number(self.high)})"

    @property
    def target(self) -> str:
        """What the median is held against; empty where nothing is."""
        if self.aim is not None:
            return f"{'≥' if self.better == 'higher' else '≤'} {number(self.aim)}"
        if self.expected is not None:
            return number(self.expected) + ("" if self.margin is None else f" ± {number(self.margin)}")
        return ""

    @property
    def met(self) -> bool | None:
        """Whether the median reaches the aim, or the expected value within its margin; None without one."""
        if self.aim is not None:
            return self.median >= self.aim if self.better == "higher" else self.median <= self.aim
        if self.expected is not None and self.margin is not None:
            return abs(self.median - self.expected) <= self.margin
        return None

    @property
    def verdict(self) -> str:
        """The table's last column."""
        said = {True: "yes ", False: "no ", None: ""}[self.met]
        return f"{said}({self.target})" if self.target else ""


def summaries(rows: Rows) -> list[Summary]:
    """All figures of all rows, in order."""
    return [
        Summary(
            row=row,
            name=figure["name"],
            rounds=len(figure["values"]),
            median=statistics.median(figure["values"]),
            low=min(figure["values"]),
            high=max(figure["values"]),
            better=figure["better"],
            aim=figure["aim"],
            expected=figure.get("expected"),
            margin=figure.get("margin"),
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
    """The table: a line a figure, and the number of values that its median is of."""
    lines = ["| row | figure | median | min – max | rounds | aim reached |", "| --- | --- | --- | --- | --- | --- |"]
    lines += [
        f"| {s.row} | {s.name} | {number(s.median)} | {number(s.low)} – {number(s.high)} | {s.rounds} | {s.verdict} |"
        for s in summaries(rows)
    ]
    return "\n".join(lines)


def aims(rows: Rows) -> str:
    """The short table: a line for every figure that is held against something; what misses it is marked."""
    lines = ["| row: figure | median | aim |", "| --- | --- | --- |"]
    lines += [
        f"| {s.row}: {s.name} | {number(s.median)} | {s.target}{' **missed**' if s.met is False else ''} |"
        for s in summaries(rows)
        if s.met is not None
    ]
    return "\n".join(lines)


def document(rows: Rows) -> str:
    """What stands between a document's marks: the table, how it was measured, and where the time goes."""
    parts = (markdown(rows), provenance(rows), swings(rows), where_time_goes(rows))
    return "\n\n".join(part for part in parts if part)


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
    """When and where each row was measured, at which commit and with which packages, by what stands beside it."""
    how, packages = {}, {}
    for row, result in rows.items():
        made = result.get("made")
        how[row] = "not recorded"
        if made:
            where = f" on {made['machine']}" if "machine" in made else ""
            how[row] = f"{made['date']} at {made['commit']}{where}"
        if made and "versions" in made:
            packages[row] = listed(made["versions"])
            packages[row] += f" (peers: {listed(made['peers'])})" if "peers" in made else ""
    said = f"Measured: {by_what_is_said(how)}."
    return f"{said} Versions: {by_what_is_said(packages)}." if packages else said


def listed(packages: Mapping[str, str]) -> str:
    """Packages with their versions."""
    return ", ".join(f"{package} {number}" for package, number in packages.items())


def by_what_is_said(of_row: Mapping[str, str]) -> str:
    """What is said of each row, once for all rows of which it is said."""
    names: dict[str, list[str]] = {}
    for row, said in of_row.items():
        names.setdefault(said, []).append(row)
    return "; ".join(f"{', '.join(rows)}: {said}" for said, rows in names.items())


def swings(rows: Rows) -> str:
    """How far the machine itself swung beside each row; empty where no row measured it."""
    of_row = [
        f"{row} " + ", ".join(f"{number(swing)} × ({probe})" for probe, swing in result["swing"].items())
        for row, result in rows.items()
        if result["swing"]
    ]
    return f"Slowest over fastest round of the probes: {'; '.join(of_row)}." if of_row else ""


def where_time_goes(rows: Rows) -> str:
    """A line a row that has a profile or notes; empty where none has."""
    lines = []
    for row, result in rows.items():
        largest = [(name, share) for name, share in result["profile"][:TOP_OF_PROFILE] if share >= SMALLEST_SHARE]
        shares = ", ".join(f"`{name}` {share:.0%}" for name, share in largest)
        if said := [*([shares] if shares else []), *map(plain, result["notes"])]:
            lines.append(f"- **{row}**: {'; '.join(said)}")
    return "\n".join(["Where our side's time goes, and notes:", "", *lines]) if lines else ""


def plain(text: str) -> str:
    """`text` so that markdown shows it as it is: names like __init__ are not bold."""
    return re.sub(r"([\\`*_<\[])", r"\\\1", text)


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
    return f"{'better' if improved else 'worse'}: {now.row}: {now.name}: {before.spread} → {now.spread}"


def versions() -> dict[str, str]:
    """Of this interpreter and of those PACKAGES that it has."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # the peers' stand in an environment of their own
            continue
    return found


def read(path: Path) -> dict[str, Any]:
    """The rows of a file that `write` made."""
    rows: dict[str, Any] = json.loads(path.read_text())["rows"]
    return rows


def write(path: Path, rows: Rows) -> None:
    """Keep `rows` in `path`; rows that it holds already and that were not measured now stay."""
    kept = read(path) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": kept | _rounded(rows)}, indent=1, ensure_ascii=False) + "\n")


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


def has_section(document: Path, section: str) -> bool:
    """Whether `document` is a file with both marks of `section`, in order."""
    return document.is_file() and _cut(document, section) is not None


def replace_section(document: Path, section: str, text: str) -> None:
    """Put `text` between `<!-- section -->` and `<!-- /section -->` in `document`."""
    parts = _cut(document, section)
    assert parts, f"{document} has no section {section}"
    before, after = parts
    document.write_text(f"{before}{text}\n{after}")


def _cut(document: Path, section: str) -> tuple[str, str] | None:
    """What stands before and after the text of `section`, marks included; None where a mark is not there."""
    before, opened, rest = document.read_text().partition(f"<!-- {section} -->\n")
    _, closed, after = rest.partition(f"<!-- /{section} -->")
    return (before + opened, closed + after) if opened and closed else None
