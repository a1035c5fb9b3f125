"""The old policy's log-probs: what every importance ratio of the step is taken against.

In: the step's mini-batches, before any update. Out: log π_old of every response token, from the trainer (recomputed by a
forward pass) or from the rollout engine (§5.4), and how far the two engines are apart at equal weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_gspo import parallel
from megatron_gspo.config import Recipe
from megatron_gspo.training.experience import MiniBatch
from megatron_gspo.training.forward import token_log_probs
from megatron_gspo.training.staleness import is_current
from megatron_gspo.training.totals import Totals
from megatron_gspo.types import MicroBatch


@dataclass(frozen=True)
class BaselineLogProbs:
    """What the updates compare with: one [T] float32 a micro-batch, by mini-batch; empty off the last pipeline stage."""

    old: list[list[torch.Tensor]]
    reference: list[list[torch.Tensor]] | None  # of the policy the run started from, where a KL penalty asks for it


def baseline_log_probs(
    policy_chunks: Sequence[torch.nn.Module],
    reference_chunks: Sequence[torch.nn.Module] | None,
    mini_batches: Sequence[MiniBatch],
    recipe: Recipe,
    totals: Totals,
) -> BaselineLogProbs:
    """Log-probs of the old policy, and of the reference policy if there is one, for every response token of the step."""
    if recipe.rollout.old_log_probs == "trainer":
        old = _by_mini_batch(policy_chunks, mini_batches, recipe)
        if parallel.is_last_stage():
            for log_probs, mini_batch in zip(old, mini_batches, strict=True):
                record_mismatch(log_probs, mini_batch, totals)
    else:
        old = [[micro_batch.behaviour_log_probs for micro_batch in mb.micro_batches] for mb in mini_batches]
    reference = None if reference_chunks is None else _by_mini_batch(reference_chunks, mini_batches, recipe)
    return BaselineLogProbs(old=old, reference=reference)


def record_mismatch(log_probs: Sequence[torch.Tensor], mini_batch: MiniBatch, totals: Totals) -> None:
    """Add to `totals` how far the rollout engine's log-probs are from the trainer's, at equal weights.

    Only responses of which that holds are counted: those that the policy sampled, whole, which now learns from them. Of
    the others' tokens, `mismatch/stale_log_prob_abs_mean` is the mean |log π_trainer − log π_engine|: engine mismatch and
    the policy's change since they were sampled.

    `mismatch/log_prob_abs_mean` is the mean |log π_trainer − log π_engine| over response tokens; `mismatch/kl` estimates
    KL(engine ‖ trainer) from the engine's own samples as the mean of e^d − 1 − d, d = log π_trainer − log π_engine.
    `mismatch/token_log_std` and `mismatch/sequence_log_std` are the spread of d over tokens, and of its mean over each
    response's tokens: what log w (eq. 3) and log s (eq. 8) are at equal weights where the engine's log-probs are the old
    policy's. A clip range narrower than that clips on noise.
    """
    for trainer, micro_batch in zip(log_probs, mini_batch.micro_batches, strict=True):
        difference = trainer.double() - micro_batch.behaviour_log_probs.double()
        current = is_current(micro_batch)
        stale = difference[~current]
        totals.add("mismatch/stale_log_prob_abs_mean", float(stale.abs().sum()), float(len(stale)))
        means = _response_means(difference, micro_batch)[_response_means(current.double(), micro_batch) > 0]
        difference = difference[current]
        count = float(len(difference))
        totals.add("mismatch/log_prob_abs_mean", float(difference.abs().sum()), count)
        totals.add("mismatch/kl", float((difference.expm1() - difference).sum()), count)
        for unit, values in (("token", difference), ("sequence", means)):
            totals.add(f"mismatch/{unit}_log", float(values.sum()), float(len(values)))
            totals.add(f"mismatch/{unit}_log_squared", float((values * values).sum()), float(len(values)))


def _response_means(values: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
    """Mean of `values` [T] float64 over each response's tokens: [responses with tokens]."""
    bounds = micro_batch.response_cu_seqlens
    lengths = bounds.diff()
    sums = torch.segment_reduce(values, "sum", offsets=bounds, axis=0, initial=0)
    return sums[lengths > 0] / lengths[lengths > 0]


def _by_mini_batch(
    chunks: Sequence[torch.nn.Module], mini_batches: Sequence[MiniBatch], recipe: Recipe
) -> list[list[torch.Tensor]]:
    """One pass over all of the step's micro-batches, cut back into mini-batches."""
    micro_batches = [micro_batch for mini_batch in mini_batches for micro_batch in mini_batch.micro_batches]
    log_probs = token_log_probs(chunks, micro_batches, temperature=recipe.rollout.temperature)
    if not log_probs:
        return [[] for _ in mini_batches]
    remaining = iter(log_probs)
    return [[next(remaining) for _ in mini_batch.micro_batches] for mini_batch in mini_batches]
