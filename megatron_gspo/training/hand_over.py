"""The policy's weights, handed to the rollout engines.

In: the policy on all ranks, and a version. Out: engines that sample with these weights and no others, on every rank at
once: no rank goes on to sample before all of them can.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from megatron_gspo import parallel
from megatron_gspo.config import Recipe
from megatron_gspo.model.hf_weights import export_hf_weights
from megatron_gspo.model.policy import PolicyModel
from megatron_gspo.training.agreement import refuse_together
from megatron_gspo.training.experience import pack_samples
from megatron_gspo.training.forward import token_log_probs
from megatron_gspo.training.rollouts import Rollouts, pad_token_id
from megatron_gspo.types import Sample, TrainingFailedError, UserError

PROBE_TOKENS = 32
#: How far an engine's log-probs may be from the trainer's, by what the less precise of the two computes in. In bfloat16
#: two right implementations differ by several tenths over a few tokens.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1.0}


class HandOverFailedError(TrainingFailedError):
    """A rollout engine did not get the weights."""

    of_all_ranks = True


def hand_over_weights(models: Sequence[PolicyModel], rollouts: Rollouts | None, version: int) -> int:
    """Give the policy's weights to every rollout engine, as `version`. All ranks take part.

    Returns:
        Bytes of the weights that were handed over.

    Raises:
        UserError: an engine does not take them, for a reason the user can mend; on every rank.
        HandOverFailedError: an engine did not get them; on every rank.
    """
    total = 0

    def counted() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal total
        for name, tensor in export_hf_weights(models):
            total += tensor.nbytes
            yield name, tensor

    weights = counted()
    problem: UserError | TrainingFailedError | None = None
    if rollouts is not None:
        try:
            rollouts.engine.update_weights(weights, version)
        except (UserError, TrainingFailedError) as error:
            problem = error
    for _ in weights:
        pass  # a tensor is gathered from the ranks that hold its parts, so ranks without an engine walk along
    _fail_together(problem)
    return total


def release_memory(rollouts: Rollouts | None) -> None:
    """Let the engines give back memory during the update. Every rank calls this once all ranks have their responses.

    Raises:
        HandOverFailedError: a server does not take the request; on every rank.
    """
    problem: UserError | TrainingFailedError | None = None
    if rollouts is not None:
        try:
            rollouts.engine.release_memory()
        except (UserError, TrainingFailedError) as error:
            problem = error
    _fail_together(problem)


def verify_weights(
    chunks: Sequence[torch.nn.Module], rollouts: Rollouts | None, recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Hold the log-probs that servers compute for a fixed sequence against the trainer's. All ranks take part.

    Raises:
        HandOverFailedError: they differ, so a server computes with other weights; on every rank.
    """
    from megatron_gspo.rollout.sglang import SglangEngine

    token_ids = [(1 + 7919 * position) % len(tokenizer) for position in range(PROBE_TOKENS)]
    sample = Sample(
        index=0,
        prompt_token_ids=np.array(token_ids[:1]),
        response_token_ids=np.array(token_ids[1:]),
        advantage=0.0,
        behaviour_log_probs=np.zeros(PROBE_TOKENS - 1, dtype=np.float32),
    )
    micro_batches = pack_samples([sample], recipe, pad_token_id(tokenizer))
    found = token_log_probs(chunks, micro_batches, temperature=1.0)
    # The last pipeline stage has them, and the first rank, which drives the servers, is on the first stage.
    log_probs = next(
        kept for kept in parallel.gather_objects(found[0].float().cpu() if found else None) if kept is not None
    )
    dtypes = {recipe.model.dtype, recipe.rollout.sglang.dtype or recipe.model.dtype}
    tolerance = TOLERANCE["bfloat16" if "bfloat16" in dtypes else "float32"]
    problem: UserError | TrainingFailedError | None = None
    if rollouts is not None and isinstance(rollouts.engine, SglangEngine):
        try:
            rollouts.engine.verify_weights(token_ids, log_probs, tolerance)
        except (UserError, TrainingFailedError) as error:
            problem = error
    _fail_together(problem)


def _fail_together(problem: UserError | TrainingFailedError | None) -> None:
    """Raise on every rank where one has a problem. A collective, which also has all ranks wait for the last engine."""
    entry = None if problem is None else (isinstance(problem, UserError), str(problem))
    found = next((entry for entry in parallel.gather_objects(entry) if entry is not None), None)
    if found is None:
        return
    is_users, words = found
    if is_users:
        refuse_together(words)
    raise HandOverFailedError(words)
