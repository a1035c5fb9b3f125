"""Which runs are seeds of one arm, what the arms are called, and whether they may be compared at all.

In: run records. Out: `Arm`s, the fields that differ between them, and what makes a comparison unfair. Runs of one arm
share every field of the recipe that bears on the result, the seed apart; where the same cold starts (`model.path`) recur
in every arm, they are replicates as seeds are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_gspo.report.read import RunRecord, Series, fields_of
from megatron_gspo.types import UserError

#: Fields, or sections, that do not bear on what a run learns or costs.
IMMATERIAL = (
    "logging",
    "warmstart",
    "model.log_probs_chunk_tokens",
    "reward.timeout_s",
    "rollout.max_concurrent_responses",
    "training.save_every",
    "training.keep_checkpoints",
)
#: What every arm is named by; such a field's value needs no name beside it.
NAMED_BY_VALUE = ("objective.name", "routing.replay")
#: Runs that differ here have no common scale: their rewards are of different things.
TASK = ("data.train", "data.arithmetic_chain", "reward.name")
#: Runs that differ here can be compared, but not fairly.
NOTED = {
    "model": ("model",),
    "evaluation": ("evaluation", "data.eval"),
    "environment": ("environment",),
    "prompts": (
        "training.prompts_per_step",
        "data.shuffle",
        "data.chat_template",
        "rollout.responses_per_prompt",
        "rollout.max_prompt_tokens",
        "rollout.max_response_tokens",
        "rollout.temperature",
        "rollout.top_p",
        "rollout.top_k",
    ),
}

Replicate = tuple[int, str]  # seed, and cold start where those are replicates


@dataclass(frozen=True, eq=False)
class Arm:
    """Runs of one recipe, by what they replicate it with."""

    name: str
    runs: dict[Replicate, RunRecord]

    def curves(self, metric: str, until: int) -> tuple[np.ndarray, np.ndarray]:
        """Steps [n] up to `until` that every run has measured the metric at, and its values [runs, n]."""
        series = [run.series(metric).until(until) for run in self.runs.values()]
        steps = series[0].steps
        for other in series[1:]:
            steps = np.intersect1d(steps, other.steps)
        return steps, np.stack([_at(one, steps) for one in series])


@dataclass(frozen=True)
class Grouping:
    """The arms of a comparison, in the order their first runs were given."""

    arms: list[Arm]
    differences: dict[str, list[Any]]  # dotted field -> each arm's value, for every field that differs
    notes: list[str]  # what makes the comparison unfair
    common_steps: int  # the last step that every run has


def group_runs(runs: Sequence[RunRecord], *, anyway: bool = False) -> Grouping:
    """Sort runs into arms.

    Args:
        anyway: compare runs of different tasks too, with a note.

    Raises:
        UserError: runs are of different tasks, or two have the same recipe and seed, or one has no step.
    """
    fields = [_material_fields(run) for run in runs]
    notes = _unfairness(runs, fields, anyway)
    for run in runs:
        if run.last_step < 1:
            raise UserError(f"RUN: {run.path} has no step of training yet; accepted: runs with at least one step")
    replicating = ["seed", "model.path"] if _cold_starts_recur(fields) else ["seed"]
    grouped: dict[str, list[int]] = {}
    for index, run_fields in enumerate(fields):
        grouped.setdefault(repr({k: v for k, v in run_fields.items() if k not in replicating}), []).append(index)
    members = list(grouped.values())
    differences = _differences([fields[indices[0]] for indices in members], replicating)
    names = _names(differences, [fields[indices[0]] for indices in members])
    arms = [
        Arm(name, _replicates([runs[index] for index in indices], by_cold_start=len(replicating) > 1))
        for name, indices in zip(names, members, strict=True)
    ]
    common, longest = min(run.last_step for run in runs), max(run.last_step for run in runs)
    if common < longest:
        short = ", ".join(run.name for run in runs if run.last_step == common)
        notes.append(
            f"Runs differ in length: all numbers are of steps 1 to {common:,}, where {short} ended; the longest has {longest:,}."
        )
    if len({frozenset(arm.runs) for arm in arms}) > 1:
        notes.append("The arms have other seeds: paired differences use those that both have.")
    return Grouping(arms, differences, notes, common)


def _replicates(runs: Sequence[RunRecord], *, by_cold_start: bool) -> dict[Replicate, RunRecord]:
    replicates: dict[Replicate, RunRecord] = {}
    for run in runs:
        key = (int(run.field("seed")), str(run.field("model.path")) if by_cold_start else "")
        if key in replicates:
            raise UserError(
                f"RUN: {replicates[key].path} and {run.path} are the same recipe with the same seed; accepted: each once"
            )
        replicates[key] = run
    return dict(sorted(replicates.items()))


def _material_fields(run: RunRecord) -> dict[str, Any]:
    return {name: value for name, value in fields_of(run.recipe) if not _within(name, IMMATERIAL)}


def _unfairness(runs: Sequence[RunRecord], fields: Sequence[dict[str, Any]], anyway: bool) -> list[str]:
    names = sorted({name for run_fields in fields for name in run_fields})
    first = fields[0]
    notes = []
    for name in names:
        other = next((index for index, of_run in enumerate(fields) if of_run.get(name) != first.get(name)), None)
        if other is None or not _within(name, TASK):
            continue
        told = f"{runs[0].name} has {name} {first.get(name)!r}, {runs[other].name} {fields[other].get(name)!r}"
        if not anyway:
            raise UserError(f"RUN: the runs are of different tasks: {told}; accepted: runs of one task, or --anyway")
        notes.append(f"NOT COMPARABLE, different tasks: {told}.")
    recurring = _cold_starts_recur(fields)
    for what, sections in NOTED.items():
        differing = [
            name
            for name in names
            if _within(name, sections)
            and any(of_run.get(name) != first.get(name) for of_run in fields)
            and not (name == "model.path" and recurring)
        ]
        if differing:
            notes.append(f"NOT LIKE WITH LIKE, another {what}: {', '.join(differing)} differ between the runs.")
    return notes


def _cold_starts_recur(fields: Sequence[dict[str, Any]]) -> bool:
    """Whether every recipe was run from the same several cold starts, so that these are replicates and no arms."""
    starts: dict[str, set[str]] = {}
    for of_run in fields:
        rest = repr({name: value for name, value in of_run.items() if name not in ("seed", "model.path")})
        starts.setdefault(rest, set()).add(str(of_run.get("model.path")))
    sets = list(starts.values())
    return len(sets) > 1 and len(sets[0]) > 1 and all(one == sets[0] for one in sets)


def _differences(arms: Sequence[dict[str, Any]], replicating: Sequence[str]) -> dict[str, list[Any]]:
    names = list(dict.fromkeys(name for arm in arms for name in arm if name not in replicating))
    values = {name: [arm.get(name) for arm in arms] for name in names}
    return {name: row for name, row in values.items() if len({repr(value) for value in row}) > 1}


def _names(differences: dict[str, list[Any]], arms: Sequence[dict[str, Any]]) -> list[str]:
    """Each arm by its objective and replay, and the fewest other fields that tell all arms apart."""
    parts = [[part for name in NAMED_BY_VALUE for part in _part(name, arm.get(name))] for arm in arms]
    keys = [tuple(repr(arm.get(name)) for name in NAMED_BY_VALUE) for arm in arms]
    for name, values in differences.items():
        finer = [(*key, repr(value)) for key, value in zip(keys, values, strict=True)]
        if len(set(finer)) > len(set(keys)):
            keys = finer
            parts = [[*arm, *_part(name, value)] for arm, value in zip(parts, values, strict=True)]
    return [" ".join(arm) for arm in parts]


def _part(name: str, value: Any) -> list[str]:
    if name == "routing.replay":
        return [] if value == "off" else [str(value)]
    if name == "objective.name":
        return [str(value)]
    shown = (
        str(value).rstrip("/").rpartition("/")[2]
        if isinstance(value, str)
        else f"{value:g}"
        if isinstance(value, float)
        else value
    )
    return [f"{name.rpartition('.')[2]}={shown}"]


def _within(name: str, sections: Sequence[str]) -> bool:
    return any(name == section or name.startswith(f"{section}.") for section in sections)


def _at(series: Series, steps: np.ndarray) -> np.ndarray:
    return series.values[np.searchsorted(series.steps, steps)]
