"""Run directories in, numbers out: what each run of the study came to, and which runs belong together.

Nothing but run directories is read: `metrics.jsonl`, `recipe.yaml`, and the `finished.json` that the schedule leaves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_gspo.report.read import RunRecord, read_run
from tools.reproduce.plan import BestRate, RunSpec, specs_of
from tools.reproduce.study import Experiment, Replicate

END_SHARE = 0.25


def finished_file(directory: Path) -> Path:
    """What says that a run, or a cold start, has ended."""
    return directory / "finished.json"


@dataclass(frozen=True, eq=False)
class Outcome:
    """A run that has ended."""

    directory: Path
    status: int  # exit status: 0, or 1 where it diverged
    cpu_s: float
    resumed: bool  # then the CPU time is of its last part alone
    record: RunRecord

    @cached_property
    def reward(self) -> np.ndarray:
        """Mean reward of each planned step, [steps]; 0 where the run had diverged before."""
        series = self.record.series("reward/mean")
        reward = np.zeros(self.record.planned_steps)
        reward[series.steps - 1] = series.values
        return reward

    @property
    def start(self) -> float:
        """Held-out pass@1 of the cold start, sampled as in training."""
        return self._evaluation(0)

    @property
    def final_evaluation(self) -> float:
        """Held-out pass@1 after the last step; 0 where the run diverged."""
        return self._evaluation(self.record.planned_steps)

    @property
    def mean_reward(self) -> float:
        """Mean reward over all steps, which is higher the faster a run learns."""
        return float(self.reward.mean())

    @property
    def end_reward(self) -> float:
        """Mean reward of the last quarter of the steps."""
        return float(self.reward[-max(1, round(END_SHARE * len(self.reward))) :].mean())

    @property
    def collapsed(self) -> bool:
        """Whether it ended below where it started, or diverged."""
        return self.status != 0 or self.end_reward < self.start

    def mean(self, metric: str) -> float:
        """Mean of a metric over the steps that have it; NaN where none has."""
        series = self.record.series(metric)
        return float(series.values.mean()) if len(series) else float("nan")

    def _evaluation(self, step: int) -> float:
        for name in self.record.matching("eval/*/pass_at_1"):
            series = self.record.series(name)
            if step in series.steps:
                return float(series.values[series.steps == step][0])
        return 0.0


def read_outcome(directory: Path) -> Outcome | None:
    """The run in `directory`; None while it has not ended."""
    file = finished_file(directory)
    if not file.is_file():
        return None
    note = json.loads(file.read_text())
    return Outcome(directory, note["status"], note["cpu_s"], note["resumed"], read_run(directory))


def chosen_rates(experiments: Sequence[Experiment], output: Path) -> BestRate:
    """Each arm's best learning rate: that with the highest mean reward in the sweep, once all of the arm's runs have ended.

    The sweep has seeds of its own, so that no arm is compared on the runs that chose its rate.
    """
    sweep = next((experiment for experiment in experiments if experiment.name == "sweep"), None)
    known: dict[str, float | None] = {}

    def best(arm: str) -> float | None:
        if sweep is None or arm not in sweep.arms:
            return None
        if arm not in known:
            specs = [spec for spec in specs_of(sweep, lambda _: None) if spec.arm == arm]
            by_rate: dict[float, list[float]] = {}
            for spec in specs:
                outcome = read_outcome(output / "runs" / spec.name)
                if outcome is None:
                    known[arm] = None
                    return None
                by_rate.setdefault(spec.rate, []).append(outcome.mean_reward)
            known[arm] = max(by_rate, key=lambda rate: (float(np.mean(by_rate[rate])), -rate))
        return known[arm]

    return best


@dataclass(frozen=True, eq=False)
class Results:
    """All that has ended of a study."""

    experiments: dict[str, Experiment]
    best_rate: BestRate
    outcomes: dict[str, Outcome]  # by the spec's name

    def of(
        self, experiment: str, arm: str, *, model: str | None = None, rate: float | None = None
    ) -> dict[Replicate, Outcome]:
        """An arm's runs by replicate; none where the study has no such experiment."""
        return {spec.replicate: self.outcomes[spec.name] for spec in self._specs(experiment, arm, model, rate)}

    def is_whole(self, experiment: str) -> bool:
        """Whether all of the experiment's runs have ended, those included whose rate the sweep decides."""
        found = self.experiments[experiment]
        known = found.learning_rates or all(self.best_rate(arm) is not None for arm in found.arms)
        return bool(known) and all(spec.name in self.outcomes for spec in specs_of(found, self.best_rate))

    def num_runs(self, experiment: str) -> int:
        """Runs of the experiment that have ended."""
        found = self.experiments.get(experiment)
        if found is None:
            return 0
        return len({spec.name for spec in specs_of(found, self.best_rate) if spec.name in self.outcomes})

    def _specs(self, experiment: str, arm: str, model: str | None, rate: float | None) -> list[RunSpec]:
        found = self.experiments.get(experiment)
        if found is None:
            return []
        return [
            spec
            for spec in specs_of(found, self.best_rate)
            if spec.arm == arm
            and spec.name in self.outcomes
            and (model is None or spec.model == model)
            and (rate is None or spec.rate == rate)
        ]


def read_results(experiments: Sequence[Experiment], output: Path) -> Results:
    """Read every run of the study that has ended."""
    best = chosen_rates(experiments, output)
    specs = {spec.name: spec for experiment in experiments for spec in specs_of(experiment, best)}
    found = {name: read_outcome(output / "runs" / name) for name in specs}
    outcomes = {name: outcome for name, outcome in found.items() if outcome is not None}
    return Results({experiment.name: experiment for experiment in experiments}, best, outcomes)


def paired(
    one: dict[Replicate, Outcome], other: dict[Replicate, Outcome], value: Callable[[Outcome], float]
) -> dict[Replicate, tuple[float, float]]:
    """Both arms' values of every replicate that both have."""
    return {key: (value(one[key]), value(other[key])) for key in one if key in other}
