"""A process that makes a step whenever it is told to, and the one that tells it.

What passes are lines of JSON on the step's standard input and output: at first the log-probs of `PROBE`, then for every
line that comes in the processor seconds and tokens of a step, and at the end the peak of resident memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tools.bench.memory import resident_bytes


class Told:
    """The side of the process that makes steps. Libraries may print: lines go out where only this class writes."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def wait(self) -> bool:
        """Wait to be told; whether there is another step to make."""
        return sys.stdin.readline().strip() == "step"

    def say(self, **content: Any) -> None:
        self._out.write(json.dumps(content) + "\n")
        self._out.flush()

    def serve(self, probe: Sequence[float], step: Callable[[], int]) -> None:
        """Make steps, each of which returns its tokens, until there are none to make."""
        self.say(probe=list(probe))
        while self.wait():
            started = time.process_time()
            tokens = step()
            self.say(seconds=time.process_time() - started, tokens=tokens)
        self.say(peak_bytes=resident_bytes("VmHWM"))


class Teller:
    """The side that tells it."""

    def __init__(self, python: str, module: str, *arguments: str | Path) -> None:
        command = [python, "-m", module, *map(str, arguments)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.probe: list[float] = self._hear()["probe"]

    def step(self) -> tuple[float, int]:
        """Processor seconds and tokens of one step."""
        said = self._tell("step")
        return said["seconds"], said["tokens"]

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
