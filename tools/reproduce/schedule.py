"""Runs the plan: so many runs side by side, none twice, and stopped ones from where they were.

In: experiments and an output directory. Out: the directory, with a `finished.json` in each run that has ended:

    models/MODEL               configuration and tokenizer
    cold_starts/MODEL_SEED     Hugging Face checkpoints
    runs/MODEL/ARM…/REPLICATE  run directories, as `train` leaves them, without checkpoints and page to save space
    logs/                      what each run said

A run that diverged has ended too, and its exit status is kept: it is a result. Signals are passed on to the runs, which
save and end; the same command then goes on.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_gspo.report.metrics import ENDED_BY
from megatron_gspo.types import UserError
from tools.reproduce import worker
from tools.reproduce.measure import chosen_rates, finished_file, read_outcome
from tools.reproduce.models import write_model
from tools.reproduce.plan import COLD_START_CPU_S, RUN_CPU_S, Plan, Task, make_plan
from tools.reproduce.study import ARMS, MODELS, Experiment

DONE, DIVERGED, STOPPED = 0, 1, 75
NOT_NEEDED_AFTERWARDS = ("checkpoints", "report.html")


@dataclass
class _Running:
    task: Task
    started: float
    resumed: bool


class Schedule:
    """The study's runs in one output directory."""

    def __init__(self, experiments: Sequence[Experiment], output: Path, jobs: int, say: Callable[[str], None]) -> None:
        self._experiments, self._output, self._jobs, self._say = experiments, output, jobs, say
        self._running: dict[int, _Running] = {}
        self._asked_to_stop = False
        self._spent_cpu_s = 0.0  # by the plan's own measure, of what this call has finished
        self._began = time.monotonic()

    def plan(self) -> Plan:
        """The plan as far as it is known by now."""
        return make_plan(self._experiments, self._output, chosen_rates(self._experiments, self._output))

    def describe(self) -> str:
        """The plan as text: what runs, what has run, and what the rest takes."""
        plan = self.plan()
        left = [task for task in plan.tasks if not is_finished(task)]
        cpu_s = sum(task.cpu_s for task in left) + plan.unknown_cpu_s
        starts = sum(task.spec is None for task in plan.tasks)
        rows = [f"  {experiment.title}: {_contents(experiment)}" for experiment in self._experiments]
        unknown = f", and {plan.num_unknown} whose learning rate the sweep decides" if plan.num_unknown else ""
        return "\n".join(
            [
                f"reproduce: {starts} cold starts and {len(plan.tasks) - starts} runs{unknown}",
                *rows,
                f"reproduce: {len(plan.tasks) - len(left)} have ended. The rest takes {_duration(cpu_s)} of CPU, "
                f"{_duration(cpu_s / self._jobs)} as {self._jobs} side by side on idle cores "
                f"({RUN_CPU_S:g} s a run of the 8-layer model, {COLD_START_CPU_S:g} s a cold start)",
                f"reproduce: {self._output}",
            ]
        )

    def run(self) -> bool:
        """Run until all has ended. False when a signal ended it before.

        Raises:
            UserError: another study runs in the directory, a run was made with other settings, or one was refused.
        """
        with _alone_in(self._output), self._passing_signals_on():
            for model in {model for experiment in self._experiments for model in experiment.models}:
                write_model(MODELS[model], self._output / "models" / model)
            worker.import_program()
            self._began = time.monotonic()
            while (task := self._next_task()) is not None or self._running:
                if task is not None and len(self._running) < self._jobs:
                    self._start(task)
                    continue
                self._end_one()
        return not self._asked_to_stop

    def _next_task(self) -> Task | None:
        """The first task that can be started; None where there is none, or none should be."""
        if self._asked_to_stop:
            return None
        under_way = {running.task.name for running in self._running.values()}
        for task in self.plan().tasks:
            ready = task.needs is None or finished_file(task.needs).is_file()
            if task.name not in under_way and ready and not is_finished(task):
                return task
        return None

    def _start(self, task: Task) -> None:
        resumed = task.spec is not None and any(task.directory.glob("checkpoints/step_*/"))
        if not resumed:
            shutil.rmtree(task.directory, ignore_errors=True)  # it was stopped before it saved
        arguments = (*task.arguments, "--resume") if resumed else task.arguments
        self._running[worker.start(arguments, self._log_of(task))] = _Running(task, time.monotonic(), resumed)

    def _end_one(self) -> None:
        ended = worker.wait_for_one(list(self._running))
        running = self._running.pop(ended.pid)
        task = running.task
        if ended.status == STOPPED or ended.status < 0:
            self._asked_to_stop = True
            self._say(f"stopped: {task.name} (status {ended.status}); the same command goes on with it")
            return
        log = self._log_of(task)
        if ended.status != DONE and not (ended.status == DIVERGED and _has_diverged(task)):
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            self._stop_all()
            raise UserError(f"{task.name} ended with status {ended.status}: {' '.join(last)} ({log})")
        note = {
            "arguments": list(_within(task, self._output)),
            "status": ended.status,
            "cpu_s": round(ended.cpu_s, 1),
            "wall_s": round(time.monotonic() - running.started, 1),
            "resumed": running.resumed,
        }
        finished_file(task.directory).write_text(json.dumps(note, indent=2) + "\n")
        if task.spec is not None:
            for name in NOT_NEEDED_AFTERWARDS:
                path = task.directory / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self._spent_cpu_s += task.cpu_s
        self._tell(task, ended)

    def _log_of(self, task: Task) -> Path:
        return self._output / "logs" / f"{task.name.replace('/', '.')}.txt"

    def _tell(self, task: Task, ended: worker.Ended) -> None:
        plan = self.plan()
        left = [other for other in plan.tasks if not is_finished(other)]
        pace = (time.monotonic() - self._began) / self._spent_cpu_s  # wall seconds for a second of the plan's
        left_s = pace * (sum(other.cpu_s for other in left) + plan.unknown_cpu_s)
        num_all = len(plan.tasks) + plan.num_unknown
        done = num_all - len(left) - plan.num_unknown
        came_to = _came_to(task) if ended.status == DONE else f"diverged (status {ended.status})"
        self._say(f"[{done}/{num_all}] {task.name}: {came_to}; {ended.cpu_s:.0f} s of CPU; {_duration(left_s)} left")

    @contextmanager
    def _passing_signals_on(self) -> Iterator[None]:
        def pass_on(number: int, frame: object) -> None:
            del number, frame
            self._say("stopping: the runs save and end" if not self._asked_to_stop else "ending the runs")
            self._send(signal.SIGKILL if self._asked_to_stop else signal.SIGTERM)
            self._asked_to_stop = True

        before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _send(self, number: signal.Signals) -> None:
        for pid in self._running:
            worker.send(pid, number)

    def _stop_all(self) -> None:
        self._send(signal.SIGTERM)
        while self._running:
            self._running.pop(worker.wait_for_one(list(self._running)).pid)


def _contents(experiment: Experiment) -> str:
    rates = ", ".join(f"{rate:g}" for rate in experiment.learning_rates) or "each arm's best"
    return (
        f"{', '.join(ARMS[arm].title for arm in experiment.arms)}; {', '.join(experiment.models)}; learning rate {rates}; "
        f"{len(experiment.replicates)} replicates"
    )


def is_finished(task: Task) -> bool:
    """Whether the task has ended.

    Raises:
        UserError: with other settings than the study has now.
    """
    file = finished_file(task.directory)
    if not file.is_file():
        return False
    output = task.directory.parents[1 if task.spec is None else 3]
    if json.loads(file.read_text())["arguments"] != list(_within(task, output)):
        raise UserError(
            f"{task.directory} was made with other settings than the study has now; accepted: another --output, or "
            "that directory removed"
        )
    return True


def _within(task: Task, output: Path) -> Iterator[str]:
    """The task's arguments with paths relative to the output directory, which may be moved."""
    return (argument.replace(f"{output}/", "") for argument in task.arguments)


def _has_diverged(task: Task) -> bool:
    """Whether a run that failed did so because its updates were not finite, and not for want of disk, say."""
    log = task.directory / "log.txt"
    return task.spec is not None and log.is_file() and f"{ENDED_BY} TrainingDivergedError" in log.read_text()


def _came_to(task: Task) -> str:
    if task.spec is None:
        return "trained"
    outcome = read_outcome(task.directory)
    assert outcome is not None, "it has just ended"
    return f"pass@1 {outcome.start:.2f} → {outcome.final_evaluation:.2f}, mean reward {outcome.mean_reward:.2f}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


@contextmanager
def _alone_in(output: Path) -> Iterator[None]:
    """Hold the directory's lock. Runs that outlive a killed study hold it on, so they are never run twice at a time."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"--output {output}: another study, or a run it left behind, is at work there") from error
        yield
