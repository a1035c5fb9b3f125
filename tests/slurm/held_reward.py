"""A reward that waits while its run is held, so that a test can reach a run in the middle of a step of its choice.

In: the file that MEGATRON_GSPO_TEST_HOLD names, for a task of an array with the task's number behind: a file of metrics,
and a number of lines. While it is there and the metrics have as many lines, no response is scored.
"""

import os
import time
from pathlib import Path

VARIABLE = "MEGATRON_GSPO_TEST_HOLD"


def even_length(prompt: object, response_text: str, finished: bool) -> float:
    """What a model of random weights gets in part, so that its updates have a gradient."""
    del prompt, finished
    hold = Path(os.environ[VARIABLE] + os.environ.get("SLURM_ARRAY_TASK_ID", ""))
    while _is_held(hold):
        time.sleep(0.1)
    return float(len(response_text.encode()) % 2 == 0)


def _is_held(hold: Path) -> bool:
    try:
        metrics, num_lines = hold.read_text().split()
        return Path(metrics).read_bytes().count(b"\n") >= int(num_lines)
    except FileNotFoundError:
        return False
