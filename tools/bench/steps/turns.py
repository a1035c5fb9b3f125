"""A process that makes a step whenever it is told to, and the one that tells it.

What passes are lines of JSON on the step's standard input and output: at first what both systems must agree on
(`Compared`), then for every line that comes what a step took (`Step`), and at the end the peak of resident memory. Time
and memory are those of the process with all that it has started (`processes.py`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.bench.steps.processes import peak_bytes, processor_seconds


@dataclass(frozen=True)
class Compared:
    """What a system computes before its first step: the same as the other, or their times mean nothing."""

    before: list[float]  # log-probs of `PROBE` after its first token
    loss: float  # of one update on `FIXED`
    gradient_norm: float  # of that update, before it is clipped
    after: list[float]  # as `before`, after that update


@dataclass(frozen=True)
class Step:
    """What a step took."""

    seconds: float  # of processors
    tokens: int  # prompts and responses, without padding
    stages: Mapping[str, float] = field(default_factory=dict)  # seconds on the wall, where the system tells


class Told:
    """The side of the process that makes steps. Libraries may print: lines go out where only this class writes."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def wait(self) -> bool:
        """Wait to be told; whether there is another step to make. Where there is none, the peak of memory is said."""
        go_on = sys.stdin.readline().strip() == "step"
        if not go_on:
            self._write({"peak_bytes": peak_bytes()})
        return go_on

    def say(self, content: Compared | Step) -> None:
        """Answer."""
        self._write(dataclasses.asdict(content))

    def serve(self, step: Callable[[], tuple[int, Mapping[str, float]]]) -> None:
        """Make steps, each of which returns its tokens and its stages' seconds, until there are none to make."""
        while self.wait():
            started = processor_seconds()
            tokens, stages = step()
            self.say(Step(processor_seconds() - started, tokens, stages))

    def _write(self, content: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(content) + "\n")
        self._out.flush()


class Teller:
    """The side that tells it."""

    def __init__(self, python: str, module: str, *arguments: str | Path) -> None:
        command = [python, "-m", module, *map(str, arguments)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.compared = Compared(**self._hear())

    def step(self) -> Step:
        """Have it make one step."""
        return Step(**self._tell("step"))

    def finish(self) -> int:
        """End it. Returns its peak of resident memory in bytes."""
        peak: int = self._tell("stop")["peak_bytes"]
        self._process.stdin.close()
        self._process.wait(timeout=60)
        return peak

    def _tell(self, what: str) -> dict[str, Any]:
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return self._hear()

    def _hear(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        assert line, f"{self._process.args} ended; why is on the terminal"
        said: dict[str, Any] = json.loads(line)
        return said
