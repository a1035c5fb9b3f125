"""The program without its start: one process imports everything once and forks every run of a test.

A run that is forked does what `python -m megatron_gspo ARGUMENTS` does from its arguments on, in a process of its own,
with its own output and exit status. Several ranks are started as torchrun starts them, by their place in the
environment; the tests that are about the program's own launcher start it as a person does.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gspo.launch import free_port

REPOSITORY = Path(__file__).parents[2]

#: What a run imports, early or late: a module left out costs each run its import.
IMPORTED = (
    "megatron_gspo.cli",
    "megatron_gspo.doctor",
    "megatron_gspo.report.metrics",
    "megatron_gspo.training.evaluation",
    "megatron_gspo.training.loop",
    "megatron_gspo.training.warmstart",
)

#: After one rank has failed, the others get this long to end by themselves.
GRACE_S = 2.0


@dataclass(frozen=True)
class Ended:
    """A run that is over; of several ranks, what all said in rank order and the status of the first that failed."""

    returncode: int
    stdout: str
    stderr: str


class Program:
    """Starts runs; the process that forks them starts with the first."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="program_"))
        self._forker: subprocess.Popen[str] | None = None
        self._num_runs = 0

    def start(self, *arguments: object, num_ranks: int = 1) -> Run:
        """Begin a run of `megatron-gspo ARGUMENTS`."""
        self._num_runs += 1
        output = self._directory / str(self._num_runs)
        output.mkdir()
        request = {
            "arguments": [str(argument) for argument in arguments],
            "num_ranks": num_ranks,
            "port": free_port(),
            "output": str(output),
        }
        return Run(self, self._ask(request)["pids"], output)

    def run(self, *arguments: object, num_ranks: int = 1) -> Ended:
        """Run `megatron-gspo ARGUMENTS` to its end."""
        return self.start(*arguments, num_ranks=num_ranks).wait()

    def statuses(self, pids: Sequence[int]) -> list[int | None]:
        """The exit statuses of a run's ranks; None for one that still runs."""
        return self._ask({"statuses": list(pids)})["statuses"]

    def close(self) -> None:
        """End the forking process."""
        if self._forker is not None:
            self._forker.communicate()  # closes its input, which ends it
        shutil.rmtree(self._directory, ignore_errors=True)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._forker is None:
            self._forker = subprocess.Popen(
                [sys.executable, "-m", "tests.end_to_end.program"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
            )
        assert self._forker.stdin is not None and self._forker.stdout is not None
        self._forker.stdin.write(json.dumps(request) + "\n")
        self._forker.stdin.flush()
        answer = self._forker.stdout.readline()
        assert answer, f"the process that forks runs died with status {self._forker.wait()}"
        return dict(json.loads(answer))


class Run:
    """A run in progress."""

    def __init__(self, program: Program, pids: Sequence[int], output: Path) -> None:
        self._program, self._pids, self._output = program, pids, output

    def has_ended(self) -> bool:
        """Whether any rank has."""
        return any(status is not None for status in self._program.statuses(self._pids))

    def signal(self, number: signal.Signals, rank: int) -> None:
        """Send a signal to one rank."""
        os.kill(self._pids[rank], number)

    def kill(self) -> None:
        """End every rank at once, with SIGKILL, and wait for it."""
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)
        self.wait()

    def wait(self, timeout_s: float = 900.0) -> Ended:
        """Wait for every rank. When one fails the others would wait for it for ever, so they are ended."""
        deadline = time.monotonic() + timeout_s
        while None in (statuses := self._program.statuses(self._pids)) and time.monotonic() < deadline:
            if any(statuses):
                deadline = min(deadline, time.monotonic() + GRACE_S)
            time.sleep(0.02)
        failed = next((status for status in statuses if status), 0)
        for pid in (pid for pid, status in zip(self._pids, statuses, strict=True) if status is None):
            os.kill(pid, signal.SIGKILL)
        assert failed or None not in statuses, f"did not end within {timeout_s:.0f} s: {self.said('stderr')}"
        return Ended(failed, self.said("stdout"), self.said("stderr"))

    def said(self, stream: str) -> str:
        """What all ranks have said on `stdout` or `stderr` so far."""
        return "".join((self._output / f"{stream}{rank}").read_text() for rank in range(len(self._pids)))


def fork_runs() -> list[str] | None:
    """The forking process: a request a line in, an answer a line out.

    Returns:
        The arguments of the run, in a process that was forked for one; None once the requests have ended.
    """
    gc.disable()
    for module in IMPORTED:
        importlib.import_module(module)
    gc.freeze()  # or the first collection of every run would copy all that was imported
    gc.enable()
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    statuses: dict[int, int | None] = {}
    for line in requests:
        request = json.loads(line)
        if "statuses" in request:
            _reap(statuses)
            answers.write(json.dumps({"statuses": [statuses[pid] for pid in request["statuses"]]}) + "\n")
            continue
        pids = []
        for rank in range(request["num_ranks"]):
            pid = os.fork()
            if pid == 0:
                os.close(requests.fileno())
                os.close(answers.fileno())
                return _become(rank, request)
            pids.append(pid)
        statuses |= dict.fromkeys(pids)
        answers.write(json.dumps({"pids": pids}) + "\n")
    _reap(statuses)
    for pid in [pid for pid, status in statuses.items() if status is None]:
        os.kill(pid, signal.SIGKILL)  # its test failed before it was over
    return None


def _reap(statuses: dict[int, int | None]) -> None:
    """Note the exit status of every run that has ended."""
    for pid in [pid for pid, status in statuses.items() if status is None]:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            statuses[pid] = os.waitstatus_to_exitcode(status)


def _become(rank: int, request: dict[str, Any]) -> list[str]:
    """Make this process a rank of a run: its input, output and place. Returns the arguments."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{request['output']}/{name}{rank}", os.O_WRONLY | os.O_CREAT), descriptor)
    if request["num_ranks"] > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(request["num_ranks"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(request["port"]),
        }
    return list(request["arguments"])


if __name__ == "__main__":
    given = fork_runs()
    if given is not None:
        from megatron_gspo.cli import main

        raise SystemExit(main(given))
