"""Is a run running, finished, stopped, failed, or gone? Told from its files alone.

The evidence, in this order: the last step of metrics.jsonl against the recipe's `training.steps`; the last line of
log.txt, which an orderly end and an exception both leave; and how long ago either file was written to, against how long
the run's steps take, since a killed process leaves no word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_gspo.report.metrics import ENDED_BY

PATIENCE_STEPS = 10
PATIENCE_S = 300.0
"""A run is taken for dead that was silent for this many times its slowest step, and at least this long."""


@dataclass(frozen=True)
class RunState:
    """How the run stands, and the evidence for it."""

    kind: Literal["finished", "running", "stopped", "failed", "silent"]
    evidence: str


def state_of(
    *, last_step: int, planned_steps: int, log_says: str | None, silent_s: float, slowest_step_s: float
) -> RunState:
    """How a run stands. `log_says` is the closing line of its log, None where there is none; times are in seconds."""
    if last_step >= planned_steps:
        return RunState("finished", f"metrics.jsonl holds all {planned_steps:,} steps of the recipe")
    if log_says is not None and log_says.startswith(ENDED_BY):
        return RunState("failed", f"log.txt: {log_says}")
    if log_says is not None:
        return RunState("stopped", f"log.txt: {log_says}; `train --resume` goes on")
    silence = f"the last sign of life in its files is {duration(silent_s)} old"
    if silent_s <= max(PATIENCE_S, PATIENCE_STEPS * slowest_step_s):
        return RunState("running", silence)
    slow = f"; its slowest step took {duration(slowest_step_s)}" if slowest_step_s > 0 else ""
    return RunState("silent", f"{silence} and its log has no closing line{slow}: it was killed, or hangs")


def duration(seconds: float) -> str:
    """Seconds as a person says them: 45 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    whole = max(0, round(seconds))
    for size, unit, smaller, smaller_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {unit}" + (f" {rest} {smaller_unit}" if rest else "")
    return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
