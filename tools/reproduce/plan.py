"""From experiments to runs: what is run with which arguments, in which order, and what it costs.

In: the study, an output directory, and what has finished there (an arm's best learning rate is known only once its sweep
has). Out: tasks, in an order of which every beginning is balanced: replicate by replicate, all arms of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.reproduce.study import (
    ARMS,
    BASE,
    MODELS,
    QUICK,
    RECIPE,
    Experiment,
    Replicate,
)

#: CPU seconds (user + system) of a run and of a cold start of the 8-layer model, of one thread: medians of this study's own.
RUN_CPU_S = 34.0
COLD_START_CPU_S = 85.0

BestRate = Callable[[str], float | None]
"""An arm's best learning rate in the sweep; None while that is not known."""


@dataclass(frozen=True)
class RunSpec:
    """One run of the study."""

    model: str
    arm: str
    rate: float
    seed: int
    cold_start: int
    variant: str = ""
    overrides: tuple[tuple[str, object], ...] = ()
    cost: float = 1.0

    @property
    def replicate(self) -> Replicate:
        """What chance decides of it."""
        return self.seed, self.cold_start

    @property
    def name(self) -> str:
        """Its directory, under `runs/`."""
        variant = f"_{self.variant}" if self.variant else ""
        return f"{self.model}/{self.arm}_lr_{self.rate:g}{variant}/seed_{self.seed}_cold_{self.cold_start}"

    @property
    def cpu_s(self) -> float:
        """What it is expected to take."""
        return RUN_CPU_S * MODELS[self.model].cost * self.cost


@dataclass(frozen=True)
class Task:
    """Something the program is started for: a cold start, or a run."""

    name: str
    directory: Path
    arguments: tuple[str, ...]
    cpu_s: float
    needs: Path | None = None  # the cold start that must have finished
    spec: RunSpec | None = None


@dataclass(frozen=True)
class Plan:
    """Tasks in order; and what the runs that are not known yet (each arm's best rate) will take."""

    tasks: list[Task]
    unknown_cpu_s: float = 0.0
    num_unknown: int = 0

    @property
    def cpu_s(self) -> float:
        """What all of it is expected to take."""
        return sum(task.cpu_s for task in self.tasks) + self.unknown_cpu_s


def specs_of(experiment: Experiment, best_rate: BestRate) -> list[RunSpec]:
    """All runs of the experiment whose learning rate is known, replicate by replicate."""
    return [spec for index in range(len(experiment.replicates)) for spec in _of_replicate(experiment, index, best_rate)]


def _of_replicate(experiment: Experiment, index: int, best_rate: BestRate) -> Iterator[RunSpec]:
    seed, cold_start = experiment.replicates[index]
    for model in experiment.models:
        for arm in experiment.arms:
            rates = experiment.learning_rates or tuple(rate for rate in (best_rate(arm),) if rate is not None)
            for rate in rates:
                overrides = tuple(experiment.overrides.items())
                yield RunSpec(model, arm, rate, seed, cold_start, experiment.variant, overrides, experiment.cost)


def make_plan(experiments: Sequence[Experiment], output: Path, best_rate: BestRate) -> Plan:
    """Every task, each run once whatever number of experiments it is of, cold starts before the first run they serve.

    What the quick form runs comes first, then wave by wave, and in each replicate by replicate.
    """
    ordered = {spec.name: spec for spec in _by_wave(experiments, best_rate)}
    quick = [spec.name for spec in _by_wave(QUICK, best_rate) if spec.name in ordered]
    ordered = {name: ordered[name] for name in dict.fromkeys([*quick, *ordered])}
    tasks: dict[str, Task] = {}
    for spec in ordered.values():
        cold_start = _cold_start_task(spec.model, spec.cold_start, output)
        tasks.setdefault(cold_start.name, cold_start)
        tasks[spec.name] = _run_task(spec, cold_start.directory, output)
    unknown = [
        len(experiment.replicates)
        for experiment in experiments
        if not experiment.learning_rates
        for arm in experiment.arms
        if best_rate(arm) is None
    ]
    return Plan(list(tasks.values()), sum(unknown) * RUN_CPU_S, sum(unknown))


def _by_wave(experiments: Sequence[Experiment], best_rate: BestRate) -> Iterator[RunSpec]:
    """Runs of experiments, the first replicates of all before the second ones of any; a run may come twice."""
    for wave in range(max(len(experiment.waves) for experiment in experiments)):
        for index in range(max(len(experiment.replicates) for experiment in experiments)):
            for experiment in experiments:
                if index < len(experiment.replicates) and _wave_of(experiment, index) == wave:
                    yield from _of_replicate(experiment, index, best_rate)


def _wave_of(experiment: Experiment, index: int) -> int:
    """The wave that a replicate is in; the last one for those beyond the waves' sum."""
    for wave, count in enumerate(experiment.waves):
        if index < count:
            return wave
        index -= count
    return len(experiment.waves) - 1


def _cold_start_task(model: str, seed: int, output: Path) -> Task:
    directory = output / "cold_starts" / f"{model}_{seed}"
    settings = {**MODELS[model].task, "model.path": output / "models" / model, "seed": seed}
    arguments = ("warmstart", RECIPE, *(f"{field}={value}" for field, value in settings.items()))
    cost = COLD_START_CPU_S * MODELS[model].cost
    return Task(f"cold_starts/{model}_{seed}", directory, (*arguments, "--output-dir", str(directory)), cost)


def _run_task(spec: RunSpec, cold_start: Path, output: Path) -> Task:
    directory = output / "runs" / spec.name
    settings = {
        **BASE,
        **MODELS[spec.model].task,
        **ARMS[spec.arm].overrides,
        **dict(spec.overrides),
        "training.learning_rate": f"{spec.rate:g}",
        "seed": spec.seed,
        "model.path": cold_start,
    }
    overrides = (f"{field}={value}" for field, value in settings.items())
    arguments = ("train", RECIPE, *overrides, "--output-dir", str(directory))
    return Task(spec.name, directory, arguments, spec.cpu_s, needs=cold_start, spec=spec)
