"""What stops a bad update before it reaches the optimizer, on all ranks or on none.

In: the gradients after a mini-batch's backward passes, and whether this rank met a non-finite loss. Out: one verdict
that every rank shares, and an error once bad updates repeat.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_gspo.training.optimizer import TrainablePolicy

logger = logging.getLogger(__name__)


class TrainingDivergedError(RuntimeError):
    """Updates were skipped one after the other; going on would only burn time."""


def all_ranks_finite(policy: TrainablePolicy, problem: str | None) -> bool:
    """True where no rank reports a `problem` and every gradient of every rank is finite. A collective over all ranks.

    A gradient that overflowed on one rank has reached the others through the reduction or not, depending on how they are
    sharded: so the ranks agree here, and either all update or none does.
    """
    finite = problem is None
    for chunk in policy.chunks:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            # The sum of finite numbers can overflow, but then the gradient norm would as well.
            finite = finite and bool(torch.isfinite(buffer.grad_data.sum()))
    verdict = torch.tensor(int(finite), device=policy.chunks[0].buffers[0].grad_data.device)
    dist.all_reduce(verdict, op=dist.ReduceOp.MIN)
    return bool(verdict)


@dataclass
class SkippedUpdates:
    """Counts the updates left out for a non-finite loss or gradient, and ends the run when they come in a row."""

    allowed_in_a_row: int
    total: int = 0
    in_a_row: int = 0

    def made(self) -> None:
        """An update was made."""
        self.in_a_row = 0

    def skipped(self, step: int, problem: str | None) -> None:
        """An update was left out.

        Raises:
            TrainingDivergedError: this was one more than `allowed_in_a_row`.
        """
        self.total += 1
        self.in_a_row += 1
        reason = problem or "a gradient is not finite"
        logger.warning("step %d: update skipped, because %s (%d in a row)", step, reason, self.in_a_row)
        if self.in_a_row > self.allowed_in_a_row:
            raise TrainingDivergedError(
                f"{self.in_a_row} updates in a row had a non-finite loss or gradient (the last: {reason}); "
                "lower training.learning_rate, or raise training.max_skipped_updates to bear more"
            )
