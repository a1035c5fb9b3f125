"""Aggregation: surrogate values in, one number out, with denominators that belong to the whole mini-batch.

Every aggregation here is a weighted sum of each response's mean over its own tokens; they differ in the weights only:

    sequence_mean     1 / num_sequences                            the paper's (eqs. 2, 6, 14)
    token_mean        |y_i| / num_tokens                           every token counts the same (DAPO)
    constant_length   |y_i| / (num_sequences · constant_length)    the same, without the batch's mean length (Dr. GRPO)

The last two weight a response by its length. For GRPO that is a choice of bias; for GSPO it undoes the method: s_i is
length-normalised so that a response counts once, as its reward does, and a length-weighted GSPO learns mostly from its
longest responses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from megatron_gspo.names import refuse_unknown_name
from megatron_gspo.policy_loss.segments import Segments
from megatron_gspo.types import UserError

AggregationName = Literal["sequence_mean", "token_mean", "constant_length"]


@dataclass(frozen=True)
class Aggregation:
    """A mini-batch's weights of responses, as far as this call's N responses are concerned."""

    segments: Segments
    response_weights: torch.Tensor  # [N] float, before division by the denominator
    denominator: float  # of the whole mini-batch, over all micro-batches and ranks
    share: float  # this call's part of the denominator; over a mini-batch's calls the shares sum to it

    def weighted_sum(self, values: torch.Tensor, unit: Literal["response", "token"]) -> torch.Tensor:
        """Sum `values` ([N] or [T], as `unit` says) with the responses' weights: 0-d, still to be divided by the denominator."""
        assert len(values) == (self.segments.num_responses if unit == "response" else self.segments.num_tokens)
        response_means = values if unit == "response" else self.segments.mean(values)
        return torch.dot(response_means, self.response_weights.to(response_means.dtype))


def make_aggregation(
    name: AggregationName,
    segments: Segments,
    dtype: torch.dtype,
    num_sequences: int | None,
    num_tokens: int | None,
    constant_length: int | None,
) -> Aggregation:
    """Work out weights and denominator; a global count left None is this call's own.

    Raises:
        UserError: an unknown aggregation, or `constant_length` without a positive length.
    """
    refuse_unknown_name("objective.aggregation", name, get_args(AggregationName))
    lengths = segments.lengths.to(dtype)
    # A call without responses or tokens has nothing to divide; 1 keeps its loss at 0 instead of 0 / 0.
    global_sequences = max(segments.num_responses, 1) if num_sequences is None else num_sequences
    global_tokens = max(segments.num_tokens, 1) if num_tokens is None else num_tokens
    assert global_sequences > 0, "a mini-batch has responses"
    assert global_tokens > 0, "a mini-batch has tokens"
    if name == "token_mean":
        return Aggregation(segments, lengths, global_tokens, segments.num_tokens)
    if name == "sequence_mean":
        # The mean over the tokens of a response that has none is 0, also where the surrogate is one value a response.
        return Aggregation(segments, (lengths > 0).to(dtype), global_sequences, segments.num_responses)
    if constant_length is None or constant_length <= 0:
        raise UserError(
            f"objective.constant_length is {constant_length}; aggregation constant_length needs a number of tokens above 0."
        )
    return Aggregation(segments, lengths / constant_length, global_sequences, segments.num_responses)
