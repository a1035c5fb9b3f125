"""`megatron-gspo compare`: one page about several arms, and the same numbers as JSON and CSV.

In: run directories. Out: the arms' differences, results and paired differences as tables, and every figure of `catalogue`
with a line an arm: the mean over its runs, in a bootstrap band.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_gspo.report import catalogue
from megatron_gspo.report.arms import Arm, Grouping, group_runs
from megatron_gspo.report.catalogue import Panel
from megatron_gspo.report.figure import Figure, Line, line_figure, number
from megatron_gspo.report.measures import (
    MEASURES,
    ArmResult,
    PairedDifference,
    arm_result,
    default_target,
    paired_differences,
)
from megatron_gspo.report.page import Fact, Page, Section, Table, write_page, write_text
from megatron_gspo.report.read import RunRecord, Series, read_run
from megatron_gspo.report.statistics import Interval, bootstrap_band
from megatron_gspo.report.warnings import RunWarning, check_run
from megatron_gspo.types import UserError

DIGITS = 3


@dataclass(frozen=True)
class Comparison:
    """What a comparison came to."""

    grouping: Grouping
    results: list[ArmResult]
    paired: list[PairedDifference]
    target_reward: float


def compare(
    paths: Sequence[Path],
    output: Path,
    *,
    target_reward: float | None = None,
    anyway: bool = False,
    as_json: bool = False,
    as_csv: bool = False,
) -> tuple[Page, list[Path]]:
    """Compare the runs in `paths`; returns the page and the files written, the page first.

    Args:
        output: the page; `as_json` and `as_csv` write beside it, under the same name with `.json` and `.csv`.
        target_reward: what `steps_to_reward` waits for (default: half-way between the runs' starts and the best end).
        anyway: compare runs of different tasks too.

    Raises:
        UserError: fewer than two runs, one that cannot be read, or runs that are not comparable.
    """
    if len({path.resolve() for path in paths}) < 2:
        raise UserError(
            f"RUN: {len(paths)} given, {len({path.resolve() for path in paths})} different; accepted: two runs or more"
        )
    comparison = compare_runs([read_run(path) for path in paths], target_reward, anyway=anyway)
    page = comparison_page(comparison)
    written = [write_page(page, output)]
    if as_json:
        write_text(output.with_suffix(".json"), to_json(comparison), "--json")
        written.append(output.with_suffix(".json"))
    if as_csv:
        write_text(output.with_suffix(".csv"), to_csv(comparison), "--csv")
        written.append(output.with_suffix(".csv"))
    return page, written


def compare_runs(runs: list[RunRecord], target_reward: float | None = None, *, anyway: bool = False) -> Comparison:
    """Group runs into arms and measure them."""
    grouping = group_runs(runs, anyway=anyway)
    target = default_target(runs, grouping.common_steps) if target_reward is None else target_reward
    results = [arm_result(arm, grouping.common_steps, target) for arm in grouping.arms]
    return Comparison(grouping, results, paired_differences(grouping, results), target)


def comparison_page(comparison: Comparison) -> Page:
    """The page about several arms."""
    grouping = comparison.grouping
    runs = [(arm, run) for arm in grouping.arms for run in arm.runs.values()]
    warnings = [
        RunWarning(f"{arm.name}, {run.name}: {warning.title}", warning.message)
        for arm, run in runs
        for warning in check_run(run)
    ]
    warnings = [RunWarning("Comparison", note) for note in grouping.notes if note.startswith("NOT")] + warnings
    notes = [note for note in grouping.notes if not note.startswith("NOT")]
    notes += [
        f"{run.name} is {run.state.kind}: {run.state.evidence}." for _, run in runs if run.state.kind != "finished"
    ]
    notes += [
        f"{run.name}: the last line of metrics.jsonl is half written and left out."
        for _, run in runs
        if run.half_written
    ]
    seeds = "; ".join(f"{arm.name}: {', '.join(str(seed) for seed, _ in arm.runs)}" for arm in grouping.arms)
    return Page(
        title=" against ".join(arm.name for arm in grouping.arms),
        badge=f"{len(runs)} runs",
        badge_kind="bad" if warnings else "good",
        facts=[
            Fact("Arms", "; ".join(f"{arm.name} ({len(arm.runs)} runs)" for arm in grouping.arms)),
            Fact("Seeds", seeds),
            Fact("Steps", f"1 to {grouping.common_steps:,}, which every run has"),
            Fact("Who is ahead", who_is_ahead(comparison)),
        ],
        warnings=warnings,
        all_clear="The runs are comparable, and no check found anything wrong with one.",
        tables=[table for table in (_results(comparison), _paired(comparison), _differences(grouping)) if table.rows],
        sections=[
            _section("training", "Training", catalogue.TRAINING, grouping),
            _section("volatility", "Expert volatility", catalogue.VOLATILITY, grouping),
            _section("cost", "Cost", catalogue.COST, grouping),
        ],
        notes=notes,
    )


def who_is_ahead(comparison: Comparison) -> str:
    """The paired difference in end reward of each arm to the first, and whether its interval leaves out 0."""
    answers = []
    for paired in comparison.paired:
        if paired.measure != "end_reward":
            continue
        verdict = "too few pairs to say" if paired.difference.low is None else "not to be told apart"
        if paired.difference.excludes_zero:
            verdict = "ahead" if paired.difference.mean > 0 else "behind"
        answers.append(
            f"{paired.arm} − {paired.baseline}: end reward {shown(paired.difference, signed=True)}, {verdict}"
        )
    return "; ".join(answers) or "there is one arm, or no seed in common"


def arm_figures(panel: Panel, grouping: Grouping) -> list[Figure]:
    """A figure for each metric of the panel that every arm has, with a line an arm."""
    figures = []
    for pattern, legend in panel.metrics.items():
        start, _, end = pattern.partition("*")
        names = sorted({name for arm in grouping.arms for run in arm.runs.values() for name in run.matching(pattern)})
        for name in names:
            lines = [line for arm in grouping.arms if (line := _line(arm, name, grouping.common_steps)) is not None]
            if not lines:
                continue
            label = legend.replace("*", name.removeprefix(start).removesuffix(end))
            title = panel.title if len(panel.metrics) == 1 else f"{panel.title}: {label}"
            figures.append(
                line_figure(
                    name.replace("/", "_"),
                    title,
                    lines,
                    panel.axis,
                    how_to_read=panel.how_to_read,
                    definition=f"{panel.definition} Mean over an arm's runs; band: 95% bootstrap over whole runs, where there are several.",
                )
            )
    return figures


def to_json(comparison: Comparison) -> str:
    """All of a comparison's numbers."""
    grouping = comparison.grouping
    content = {
        "common_steps": grouping.common_steps,
        "target_reward": comparison.target_reward,
        "notes": grouping.notes,
        "differences": grouping.differences,
        "measures": {measure.name: measure.meaning for measure in MEASURES},
        "arms": [
            {
                "name": arm.name,
                "runs": [
                    {
                        "path": str(run.path),
                        "seed": seed,
                        "cold_start": cold_start or None,
                        "state": run.state.kind,
                        "values": {name: values[index] for name, values in result.values.items()},
                    }
                    for index, ((seed, cold_start), run) in enumerate(arm.runs.items())
                ],
                "means": {name: asdict(mean) for name, mean in result.means.items() if mean is not None},
            }
            for arm, result in zip(grouping.arms, comparison.results, strict=True)
        ],
        "paired_differences": [asdict(paired) for paired in comparison.paired],
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def to_csv(comparison: Comparison) -> str:
    """One line a run: arm, run, seed, cold start, and its measures; empty where a run has none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["arm", "run", "seed", "cold_start", *(measure.name for measure in MEASURES)])
    for arm, result in zip(comparison.grouping.arms, comparison.results, strict=True):
        for index, ((seed, cold_start), run) in enumerate(arm.runs.items()):
            row = [result.values[measure.name][index] for measure in MEASURES]
            writer.writerow(
                [arm.name, str(run.path), seed, cold_start, *("" if value is None else value for value in row)]
            )
    return text.getvalue()


def shown(interval: Interval, *, signed: bool = False) -> str:
    """A mean with its interval, as text."""
    mean = _text(interval.mean, signed=signed)
    if interval.low is None or interval.high is None:
        return f"{mean} (n = {interval.count}, no interval)"
    return f"{mean} [{_text(interval.low, signed=signed)}, {_text(interval.high, signed=signed)}]"


def _text(value: float, *, signed: bool = False) -> str:
    plain = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{DIGITS}g}"
    return f"+{plain}" if signed and value > 0 else plain


def _line(arm: Arm, name: str, until: int) -> Line | None:
    steps, values = arm.curves(name, until)
    return Line(arm.name, Series(steps, values.mean(0)), bootstrap_band(values)) if len(steps) else None


def _section(id: str, title: str, panels: Sequence[Panel], grouping: Grouping) -> Section:
    figures = [(panel.title, arm_figures(panel, grouping)) for panel in panels]
    return Section(
        id,
        title,
        "Each line is an arm: the mean over its runs at the steps that all of them measured.",
        [figure for _, found in figures for figure in found],
        [name for name, found in figures if not found],
    )


def _results(comparison: Comparison) -> Table:
    arms = comparison.grouping.arms
    rows = []
    for measure in MEASURES:
        if all(result.means[measure.name] is None for result in comparison.results):
            continue
        cells = [_cell(result.values[measure.name]) for result in comparison.results]
        rows.append([measure.title, *cells, measure.meaning])
    return Table(
        "Results",
        ["measure", *(arm.name for arm in arms), "meaning"],
        rows,
        f"Mean over runs, and the lowest to the highest run. The target reward is {number(comparison.target_reward)}.",
        explained=True,
    )


def _cell(values: list[float | None]) -> str:
    """The mean of an arm's runs, their range, and how many have no value."""
    known = [value for value in values if value is not None]
    if not known:
        return "none"
    text = _text(sum(known) / len(known))
    if min(known) < max(known):
        text += f" ({_text(min(known))} to {_text(max(known))})"
    return text + (f"; {len(values) - len(known)} of {len(values)} never" if len(known) < len(values) else "")


def _paired(comparison: Comparison) -> Table:
    titles = {measure.name: measure.title for measure in MEASURES}
    better = {measure.name: measure.better for measure in MEASURES}
    rows = [
        [
            f"{titles[paired.measure]}: {paired.arm} − {paired.baseline}",
            shown(paired.difference, signed=True),
            str(paired.difference.count),
            better[paired.measure] or "neither",
        ]
        for paired in comparison.paired
    ]
    return Table(
        "Paired differences",
        ["difference", "mean [95% interval]", "pairs", "better"],
        rows,
        "Runs of equal seed (and cold start) are subtracted first, so what they share cancels. Student's interval: one that leaves "
        "out 0 tells the arms apart; among many measures one in twenty does so by chance.",
    )


def _differences(grouping: Grouping) -> Table:
    rows = [[name, *(str(value) for value in values)] for name, values in grouping.differences.items()]
    return Table("What differs between the arms", ["field", *(arm.name for arm in grouping.arms)], rows)
