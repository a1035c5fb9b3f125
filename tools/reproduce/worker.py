"""One run of the program in a process of its own, forked from this one, which has imported everything once.

In: the program's arguments and a file for what it says. Out: its process; when that has ended, its exit status and CPU
seconds. Importing takes as long as a third of a run here, so it is done once for all of them.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: What a run imports, early or late: a module left out costs each run its import.
IMPORTED = (
    "megatron_gspo.cli",
    "megatron_gspo.report.run_report",
    "megatron_gspo.training.evaluation",
    "megatron_gspo.training.loop",
    "megatron_gspo.training.warmstart",
)


@dataclass(frozen=True)
class Ended:
    """A process that is over."""

    pid: int
    status: int  # exit status; negative is the signal that ended it
    cpu_s: float  # user and system


def import_program() -> None:
    """Import what runs need, once, before the first is forked."""
    gc.disable()
    for module in IMPORTED:
        importlib.import_module(module)
    gc.freeze()  # or the first collection of every run would copy all that was imported
    gc.enable()


def start(arguments: Sequence[str], log: Path) -> int:
    """Run `megatron-gspo ARGUMENTS`; what it says is added to `log`. Returns the process' id."""
    log.parent.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setpgid(0, 0)  # an interrupt from the terminal is the study's to pass on
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        from megatron_gspo.cli import main

        status = main(list(arguments))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        import sys

        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # nothing of the study, whose copy this process is, may run on in it


def wait_for_one(pids: Sequence[int]) -> Ended:
    """Wait until one of the processes has ended."""
    while True:
        for pid in pids:
            ended, status, usage = os.wait4(pid, os.WNOHANG)
            if ended:
                return Ended(pid, os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime)
        time.sleep(0.1)


def send(pid: int, number: signal.Signals) -> None:
    """Signal a run, which may have ended meanwhile."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
