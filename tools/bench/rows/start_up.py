"""Start-up of the program, beside that of Python itself: processor time of the whole process, from start to exit."""

from __future__ import annotations

import resource
import subprocess
import sys
from functools import partial

from tools.bench.harness import Bench

PROGRAM = ("-m", "megatron_gspo")


def measure(bench: Bench) -> None:
    """`--help` beside `python -c pass`, `doctor` beside importing PyTorch."""
    assert "usage: megatron-gspo" in run(*PROGRAM, "--help"), "what is timed answers"
    assert "Training can run here" in run(*PROGRAM, "doctor"), "what is timed answers"
    runs = {
        "--help": partial(run, *PROGRAM, "--help"),
        "doctor": partial(run, *PROGRAM, "doctor"),
        "pass": partial(run, "-c", "pass"),
        "torch": partial(run, "-c", "import torch"),
    }
    quick = {name: runs[name] for name in ("--help", "pass")}
    times = bench.alternate(quick, clock=seconds_of_children)
    bench.figure("--help / python -c pass", times.ratio("--help", "pass"), better="lower", aim=10)
    times = bench.alternate({name: runs[name] for name in ("doctor", "torch")}, rounds=2, clock=seconds_of_children)
    bench.figure("doctor / python -c 'import torch'", times.ratio("doctor", "torch"), better="lower")
    imported = run("-X", "importtime", *PROGRAM, "--help", error=True)
    bench.note("--help imports torch" if " torch\n" in imported else "--help does not import torch")


def run(*arguments: str, error: bool = False) -> str:
    """What Python prints."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
    return done.stderr if error else done.stdout


def seconds_of_children() -> float:
    """Processor time of all processes that were started and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
