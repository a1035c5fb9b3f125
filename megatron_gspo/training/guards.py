"""What stops a bad update before it reaches the optimizer, on all ranks or on none.

In: the gradients after a mini-batch's backward passes, and whether this rank met a non-finite loss. Out: one verdict
that every rank shares, and an error once bad updates repeat.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from megatron_gspo import parallel
from megatron_gspo.training.optimizer import TrainablePolicy
from megatron_gspo.types import TrainingFailedError

logger = logging.getLogger(__name__)

BAD_GRADIENT = "the norm of a gradient is not finite"


class TrainingDivergedError(TrainingFailedError):
    """Updates were skipped one after the other; going on would only burn time."""

    of_all_ranks = True


def problem_of_any_rank(policy: TrainablePolicy, problem: str | None) -> str | None:
    """Why no rank may update: the first rank's `problem`, or a gradient whose norm is not finite. A collective.

    A gradient that overflowed on one rank has reached the others through the reduction or not, depending on how they are
    sharded: so the ranks agree here, and either all update (None) or none does.
    """
    if problem is None and not all(
        bool(torch.isfinite(torch.linalg.vector_norm(buffer.grad_data)))
        for chunk in policy.chunks
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]
    ):
        problem = BAD_GRADIENT
    refused = [found for found in parallel.gather_objects(problem) if found is not None]
    # A response that was refused on one rank may leave others with nothing but a bad gradient: it says more.
    refused.sort(key=lambda found: found == BAD_GRADIENT)
    return refused[0] if refused else None


@dataclass
class SkippedUpdates:
    """Counts the updates left out for a non-finite loss or gradient, and ends the run when they come in a row."""

    allowed_in_a_row: int
    total: int = 0
    in_a_row: int = 0

    def made(self) -> None:
        """An update was made."""
        self.in_a_row = 0

    def skipped(self, step: int, problem: str) -> None:
        """An update was left out.

        Raises:
            TrainingDivergedError: this was one more than `allowed_in_a_row`.
        """
        self.total += 1
        self.in_a_row += 1
        logger.warning("step %d: update skipped: %s (%d in a row)", step, problem, self.in_a_row)
        if self.in_a_row > self.allowed_in_a_row:
            raise TrainingDivergedError(
                f"{self.in_a_row} updates in a row had a non-finite loss or gradient (the last: {problem}); "
                "lower training.learning_rate, or raise training.max_skipped_updates to bear more"
            )
