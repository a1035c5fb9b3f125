"""Running micro-batches through the policy, with or without gradient, under any pipeline schedule.

In: packed micro-batches. Out: what the loss function returned for each, on the last pipeline stage; an empty list on
the others. This is the one place that speaks to Megatron's `forward_backward_func`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_gspo import parallel
from megatron_gspo.model.policy import TokenLogProbs
from megatron_gspo.types import MicroBatch

Result = TypeVar("Result")

#: (position of the micro-batch, the micro-batch, its log-probs) -> (loss, what to keep of it)
LossFunction = Callable[[int, MicroBatch, TokenLogProbs], tuple[torch.Tensor, Result]]


def run_micro_batches(
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    loss_function: LossFunction[Result],
    *,
    temperature: float,
    with_entropy: bool,
    forward_only: bool = False,
) -> list[Result]:
    """Forward (and, unless `forward_only`, backward) every micro-batch; gradients are added to the chunks' own.

    Every rank of the model-parallel group passes the same micro-batches, and every data-parallel rank equally many.
    Losses are summed, never averaged: their denominators are the mini-batch's.
    """
    assert micro_batches, "a schedule needs at least one micro-batch"

    def forward_step(
        data_iterator: Iterator[tuple[int, MicroBatch]], model: torch.nn.Module
    ) -> tuple[torch.Tensor | TokenLogProbs, Callable[..., tuple[torch.Tensor, torch.Tensor, Result]]]:
        position, micro_batch = next(data_iterator)
        output = model(micro_batch, temperature=temperature, with_entropy=with_entropy)
        return output, partial(_apply, loss_function, position, micro_batch)

    with torch.set_grad_enabled(not forward_only):
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            # With virtual pipeline stages every chunk walks the micro-batches by itself.
            data_iterator=[iter(enumerate(micro_batches)) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(micro_batches),
            # Only fixed-length pipelines read these two; ours exchange shapes (`variable_seq_lengths`).
            seq_length=max(len(micro_batch.token_ids) for micro_batch in micro_batches),
            micro_batch_size=1,
            forward_only=forward_only,
        )


def token_log_probs(
    chunks: Sequence[torch.nn.Module], micro_batches: Sequence[MicroBatch], *, temperature: float
) -> list[torch.Tensor]:
    """Log-prob of every response token, without gradient: one [T] float32 a micro-batch (last pipeline stage only)."""

    def keep(position: int, micro_batch: MicroBatch, output: TokenLogProbs) -> tuple[torch.Tensor, torch.Tensor]:
        del position, micro_batch
        return output.log_probs.sum(), output.log_probs

    return run_micro_batches(
        chunks, micro_batches, keep, temperature=temperature, with_entropy=False, forward_only=True
    )


def _apply(
    loss_function: Callable[..., Any], position: int, micro_batch: MicroBatch, output: TokenLogProbs
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Megatron's three-part form of a loss: the summed loss, the tokens it counts, and what to keep."""
    loss, kept = loss_function(position, micro_batch, output)
    # Every context-parallel rank has the loss of all tokens; Megatron adds their counts up.
    counted = len(micro_batch.target_token_ids) if parallel.is_first_context_rank() else 0
    return loss, torch.tensor(counted, dtype=torch.int, device=loss.device), kept
