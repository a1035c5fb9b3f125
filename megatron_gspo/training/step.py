"""One policy update on one mini-batch.

In: a mini-batch, the old policy's log-probs. Out: the policy changed by one optimizer step (or left alone where a loss or
gradient is not finite), and the update's measurements in `Totals`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from megatron_gspo.config import Recipe
from megatron_gspo.model.policy import TokenLogProbs
from megatron_gspo.policy_loss import NonFiniteLogProbError, PolicyLossOutput, policy_loss
from megatron_gspo.training.experience import MiniBatch
from megatron_gspo.training.forward import run_micro_batches
from megatron_gspo.training.guards import SkippedUpdates, problem_of_any_rank
from megatron_gspo.training.old_policy import record_mismatch
from megatron_gspo.training.optimizer import TrainablePolicy
from megatron_gspo.training.totals import Totals
from megatron_gspo.types import MicroBatch


@dataclass(frozen=True)
class _Measured:
    """What one micro-batch's loss leaves behind, on the last pipeline stage."""

    loss: PolicyLossOutput
    log_probs: torch.Tensor  # [T] float32
    entropy_sum: torch.Tensor  # 0-d
    num_tokens: int


class MiniBatchLoss:
    """The policy loss of one mini-batch, micro-batch by micro-batch; remembers the first problem instead of raising.

    A rank that raised in the middle of a schedule would leave the others waiting in a collective. So a non-finite
    log-prob makes the micro-batch's loss a plain zero, and the problem is reported for all ranks to agree on.
    """

    def __init__(
        self,
        recipe: Recipe,
        mini_batch: MiniBatch,
        old_log_probs: list[torch.Tensor],
        reference_log_probs: list[torch.Tensor] | None,
    ) -> None:
        self.recipe = recipe
        self.mini_batch = mini_batch
        self.old_log_probs = old_log_probs
        self.reference_log_probs = reference_log_probs
        self.problem: str | None = None

    def __call__(
        self, position: int, micro_batch: MicroBatch, output: TokenLogProbs
    ) -> tuple[torch.Tensor, _Measured | None]:
        """The loss of micro-batch number `position`, and what it measured (None where it was refused)."""
        objective = self.recipe.objective
        try:
            loss = policy_loss(
                objective.name,
                output.log_probs,
                self.old_log_probs[position],
                micro_batch.advantages,
                micro_batch.response_cu_seqlens,
                clip_low=objective.clip_low,
                clip_high=objective.clip_high,
                num_sequences=self.mini_batch.num_responses,
                num_tokens=self.mini_batch.num_tokens,
                dual_clip=objective.dual_clip,
                aggregation=objective.aggregation,
                constant_length=self._constant_length(),
                behaviour_log_probs=micro_batch.behaviour_log_probs,
                truncated_importance_cap=objective.truncated_importance_cap,
                reference_log_probs=self.reference_log_probs[position] if self.reference_log_probs else None,
                kl_coefficient=objective.kl_coefficient,
                kl_estimator=objective.kl_estimator,
                sequence_ids=micro_batch.sample_indices,
            )
        except NonFiniteLogProbError as error:
            self.problem = self.problem or str(error)
            return (output.log_probs.nan_to_num() * 0.0).sum(), None
        assert output.entropy is not None, "updates measure the entropy"
        measured = _Measured(
            loss, output.log_probs.detach(), output.entropy.detach().sum(), len(micro_batch.target_token_ids)
        )
        return loss.loss, measured

    def _constant_length(self) -> int | None:
        objective = self.recipe.objective
        if objective.aggregation != "constant_length":
            return None
        return objective.constant_length or self.recipe.max_sampled_tokens


def update_policy(
    policy: TrainablePolicy,
    mini_batch: MiniBatch,
    loss: MiniBatchLoss,
    skipped: SkippedUpdates,
    step: int,
    totals: Totals,
    *,
    measure_mismatch: bool,
    routing: AbstractContextManager[None] | None = None,
) -> None:
    """Make one policy update, or leave it out on every rank if any rank met a non-finite loss or gradient.

    The forward and backward passes run in `routing`, which replays or records routes.

    `measure_mismatch` compares this forward pass with the rollout engine: right before the first update only, while both
    hold the same weights, and where no old-policy pass did it.

    Raises:
        TrainingDivergedError: too many updates in a row were left out.
    """
    policy.clear_gradients()
    with routing or nullcontext():
        measured = run_micro_batches(
            policy.chunks,
            mini_batch.micro_batches,
            loss,
            temperature=loss.recipe.rollout.temperature,
            with_entropy=True,
        )
    kept = [entry for entry in measured if entry is not None]
    problem = problem_of_any_rank(policy, loss.problem)
    if problem is not None:
        skipped.skipped(step, problem)
        return
    count_skipped(mini_batch, loss.recipe.objective.aggregation, totals)
    for entry in kept:
        totals.add_all(entry.loss.metrics)
        totals.raise_to(entry.loss.maxima)
        totals.add("entropy/mean", float(entry.entropy_sum), entry.num_tokens)
    if measure_mismatch and kept:
        record_mismatch([entry.log_probs for entry in kept], mini_batch, totals)
    totals.add("lr", policy.learning_rate, 1)
    _, gradient_norm, _ = policy.optimizer.step()
    totals.add("grad_norm", float(gradient_norm), 1)
    policy.scheduler.step(1)
    skipped.made()


def count_skipped(mini_batch: MiniBatch, aggregation: str, totals: Totals) -> None:
    """Count the responses that were not passed through the model where what they would have measured is known.

    At advantage 0 a response adds 0 to the loss and nothing of it is clipped, but it is one of those that the loss and the
    clip fractions are means over.
    """
    num_responses = len(mini_batch.skipped)
    num_tokens = sum(sample.num_sampled_tokens for sample in mini_batch.skipped)
    totals.add("loss/policy", 0.0, num_tokens if aggregation == "token_mean" else num_responses)
    totals.add("clip/sequence_fraction", 0.0, num_responses)
    for name in ("clip/token_fraction", "clip/low_fraction", "clip/high_fraction"):
        totals.add(name, 0.0, num_tokens)
