"""Reads a run directory, of a running, finished or crashed run; `metrics.py` says what it holds.

In: the directory's files, nothing else. Out: `RunRecord`: the recipe, the environment, every metric as a `Series`, and
what the files say of how the run ended.
"""

from __future__ import annotations

import fnmatch
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_gspo.report.metrics import ENDED_BY, ENDED_IN_ORDER, read_metrics_file
from megatron_gspo.report.state import RunState, state_of
from megatron_gspo.types import UserError


@dataclass(frozen=True, eq=False)
class Series:
    """One metric over the steps that measured it; values that were not finite are left out."""

    steps: np.ndarray  # [n] int64, ascending
    values: np.ndarray  # [n] float64, finite

    def __len__(self) -> int:
        return len(self.steps)

    def until(self, step: int) -> Series:
        """The part up to and with `step`."""
        kept = self.steps <= step
        return Series(self.steps[kept], self.values[kept])

    def end(self, share: float) -> np.ndarray:
        """The values of the last `share` of the measured steps, at least one where there is any."""
        return self.values[len(self.values) - self._count(share) :]

    def start(self, share: float) -> np.ndarray:
        """The values of the first `share` of the measured steps, at least one where there is any."""
        return self.values[: self._count(share)]

    def _count(self, share: float) -> int:
        return min(len(self.values), max(1, round(share * len(self.values))))


@dataclass(frozen=True, eq=False)
class RunRecord:
    """A run as its directory tells it."""

    path: Path
    recipe: Mapping[str, Any]  # fully resolved, nested as in recipe.yaml
    environment: Mapping[str, Any]  # empty where environment.json is missing
    lines: list[dict[str, float | None]] = field(repr=False)  # of metrics.jsonl
    half_written: bool  # the last line of metrics.jsonl is not whole
    state: RunState

    @property
    def name(self) -> str:
        """What to call the run: its directory's name."""
        return self.path.resolve().name

    @property
    def last_step(self) -> int:
        """The last step that metrics.jsonl holds; 0 where only the evaluation before training is there."""
        return int(self.lines[-1]["step"] or 0)

    @property
    def planned_steps(self) -> int:
        """The steps that the recipe asks for."""
        return int(self.field("training.steps"))

    @cached_property
    def metric_names(self) -> list[str]:
        """All metrics that some step has, sorted."""
        return sorted({name for line in self.lines for name in line} - {"step", "policy_version"})

    @cached_property
    def not_finite(self) -> dict[str, list[int]]:
        """Steps at which a metric was NaN or infinite (null in metrics.jsonl), by metric."""
        found: dict[str, list[int]] = {}
        for line in self.lines:
            for name, value in line.items():
                if value is None:
                    found.setdefault(name, []).append(int(line["step"] or 0))
        return found

    def series(self, name: str) -> Series:
        """The metric over the steps; empty where no step has it."""
        points = [(line["step"], value) for line in self.lines if (value := line.get(name)) is not None]
        steps, values = zip(*points, strict=True) if points else ((), ())
        return Series(np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64))

    def matching(self, pattern: str) -> list[str]:
        """The metrics that a name, in which `*` stands for anything, matches."""
        return fnmatch.filter(self.metric_names, pattern)

    def field(self, dotted: str) -> Any:
        """A field of the recipe, by its dotted path.

        Raises:
            UserError: the recipe does not have it.
        """
        value: Any = self.recipe
        for name in dotted.split("."):
            if not isinstance(value, Mapping) or name not in value:
                raise UserError(f"{self.path / 'recipe.yaml'}: {dotted} is missing; accepted: the recipe `train` wrote")
            value = value[name]
        return value

    def volatility_files(self) -> list[tuple[int, Path]]:
        """Step and path of each `volatility/step_*.npz`, by step."""
        numbered = [(path.stem.removeprefix("step_"), path) for path in self.path.glob("volatility/step_*.npz")]
        return sorted((int(number), path) for number, path in numbered if number.isdigit())


def read_run(path: Path, now: float | None = None) -> RunRecord:
    """Read the run directory `path`. `now` is the time that its last sign of life is compared with (default: now).

    Raises:
        UserError: it is no run directory, or nothing has been measured yet, or a file in it is broken.
    """
    if not (path / "metrics.jsonl").is_file():
        raise UserError(f"RUN: {path} holds no metrics.jsonl; accepted: the --output-dir of a training run")
    lines, half_written = read_metrics_file(path / "metrics.jsonl")
    if not lines:
        raise UserError(f"RUN: {path / 'metrics.jsonl'} is still empty; accepted: a run whose first step has ended")
    recipe = _read_mapping(path / "recipe.yaml", yaml.safe_load, yaml.YAMLError)
    has_environment = (path / "environment.json").is_file()
    environment = _read_mapping(path / "environment.json", json.loads, ValueError) if has_environment else {}
    planned = recipe.get("training", {}).get("steps") if isinstance(recipe.get("training"), Mapping) else None
    if not isinstance(planned, int):
        raise UserError(f"{path / 'recipe.yaml'}: training.steps is missing; accepted: the recipe `train` wrote")
    step_s = [value for line in lines if (value := line.get("time/step_s")) is not None]
    state = state_of(
        last_step=int(lines[-1]["step"] or 0),
        planned_steps=planned,
        log_says=_how_it_ended(path / "log.txt"),
        silent_s=(time.time() if now is None else now) - _last_sign_of_life(path),
        slowest_step_s=max(step_s, default=0.0),
    )
    return RunRecord(path, recipe, environment, lines, half_written, state)


def fields_of(recipe: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of every field of a resolved recipe."""
    for name, value in recipe.items():
        if isinstance(value, Mapping):
            yield from fields_of(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _read_mapping(file: Path, parse: Any, broken: type[Exception]) -> dict[str, Any]:
    try:
        content = parse(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"RUN: {file} cannot be read ({error.strerror}); accepted: a whole run directory") from error
    except (broken, UnicodeDecodeError) as error:
        raise UserError(f"{file} is broken: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no mapping; accepted: what `train` wrote")
    return content


def _how_it_ended(log: Path) -> str | None:
    """The last line of log.txt where it says that, and how, the run ended."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    last = next((line for line in reversed(lines) if line.strip()), "")
    for words in (ENDED_BY, ENDED_IN_ORDER):
        if words in last:
            return last[last.index(words) :]
    return None


def _last_sign_of_life(path: Path) -> float:
    """When metrics.jsonl or log.txt was last written to, in seconds since the epoch."""
    return max(file.stat().st_mtime for file in (path / "metrics.jsonl", path / "log.txt") if file.is_file())
