"""No rollout engine answers any more: a fault that time mends, so the run is saved and left, to be gone on with.

In: a step or an evaluation that broke off on all ranks at once (`agreement.unless_an_engine_is_gone`). Out: a checkpoint of
the last finished step, as if the one under way had never begun: its prompts are drawn again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_gspo import parallel
from megatron_gspo.training.agreement import OutageError
from megatron_gspo.training.assembly import Run
from megatron_gspo.training.checkpoint_saver import CheckpointSaver
from megatron_gspo.training.guards import SkippedUpdates

logger = logging.getLogger(__name__)


@dataclass
class Reached:
    """The last finished step: its updates are made, and its responses will not be asked for again."""

    step: int
    line: dict[str, Any]  # its metrics so far
    prompts: Mapping[str, Any]  # the data cursor behind it
    owes_evaluation: bool  # it is still to be evaluated, where that is due, and its metrics to be recorded
    is_saved: bool

    def go_on_to(self, run: Run, step: int, line: Mapping[str, Any]) -> None:
        """`step` is finished, though not evaluated yet."""
        self.step, self.line, self.prompts = step, dict(line), run.prompts.state()
        self.owes_evaluation, self.is_saved = True, False

    def evaluated(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """Its line of metrics with those of the evaluation."""
        self.line |= metrics
        self.owes_evaluation = False
        return self.line


def save_reached(
    outage: OutageError, run: Run, reached: Reached, skipped: SkippedUpdates, saver: CheckpointSaver
) -> None:
    """Take back what was begun after the last finished step, and save the run there. Every rank takes part.

    Raises:
        SaveFailedError: the checkpoint could not be written.
    """
    if parallel.is_main_rank():
        logger.error("%s; the run ends after step %d", outage, reached.step)
    run.prompts.load_state(reached.prompts)
    if not reached.is_saved:
        saver.save(run, reached.step, skipped, reached.line, owes_evaluation=reached.owes_evaluation)
    saver.finish()
