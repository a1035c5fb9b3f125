"""Results of a study with known numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from megatron_gspo.report.read import RunRecord
from megatron_gspo.report.state import RunState
from tools.reproduce.measure import Outcome, Results
from tools.reproduce.plan import RunSpec, specs_of
from tools.reproduce.study import COMMON_RATE, FULL, Experiment

Values = Mapping[str, float]
MakeRun = Callable[[RunSpec], Values | None]


def outcome(changes: Values, *, start: float = 0.5, status: int = 0) -> Outcome:
    """A run of 20 steps in memory, of these metrics alone; it starts at pass@1 `start`."""
    values = {"reward/mean": 0.6, "clip/token_fraction": 0.1, "response/length_mean": 14.0, **changes}
    lines = [{"step": 0, "eval/arithmetic_chain/pass_at_1": start}]
    lines += [{"step": step, **values} for step in range(1, 21)]
    run = RunRecord(Path("run"), {"training": {"steps": 20}}, {}, lines, False, RunState("finished", ""))
    return Outcome(Path("run"), status, 30.0, False, run)


def study(make: MakeRun, experiments: Sequence[Experiment] = FULL, start: float = 0.5) -> Results:
    """The study's results, each run as `make` says; a run for which it says None has not ended."""

    def best_rate(arm: str) -> float:
        del arm
        return COMMON_RATE

    specs = {spec.name: spec for experiment in experiments for spec in specs_of(experiment, best_rate)}
    made = {name: make(spec) for name, spec in specs.items()}
    outcomes = {name: outcome(changes, start=start) for name, changes in made.items() if changes is not None}
    return Results({experiment.name: experiment for experiment in experiments}, best_rate, outcomes)


@pytest.fixture(name="study")
def study_fixture() -> Callable[..., Results]:
    return study
