"""The door of the policy loss: a log-prob, old log-prob or advantage that is not finite is refused by name.

One NaN among a million tokens makes every parameter NaN at the next update, and nothing in the loss says which response
brought it. Looking costs one wait for the device, and a pass that is made anyway: a log-ratio is finite only where both of
its log-probs are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from megatron_gspo.policy_loss.segments import Segments


class NonFiniteLogProbError(Exception):
    """A value the policy loss was given is NaN or infinite. Nobody's recipe is at fault: the model or the engine is."""

    def __init__(self, quantity: str, value: float, response: object, token: int | None) -> None:
        self.quantity = quantity  # "log-prob", "old log-prob", "reference log-prob" or "advantage"
        self.value = value
        self.response = response  # the name given in `sequence_ids`, else the response's number in the micro-batch
        self.token = token  # position in the response, from 0; None for a response's own advantage
        where = f"response {response}" if token is None else f"token {token} (from 0) of response {response}"
        super().__init__(f"the {quantity} of {where} is {value}; it was refused before it could reach the optimizer")


def refuse_non_finite(
    inputs: Mapping[str, torch.Tensor],
    magnitudes: Sequence[torch.Tensor],
    segments: Segments,
    sequence_ids: Sequence[object] | None,
) -> None:
    """Return when every value of `inputs` (name -> [T] or [N]) is finite and the segments cover the tokens.

    Args:
        magnitudes: `abs_max` of as much, 0-d, as is finite only where all inputs are. What is not, although they are (a
            difference that overflowed), is left to the guard of the optimizer step.

    Raises:
        NonFiniteLogProbError: for the first value that is not finite.
    """
    # One wait brings both to the host, where looking at a few numbers is cheap. Float64 holds them all exactly.
    looked_at = torch.cat([segments.cu_seqlens, torch.stack(list(magnitudes)).double()]).tolist()
    bounds, largest = looked_at[: -len(magnitudes)], looked_at[-len(magnitudes) :]
    covers = bounds[0] == 0 and bounds[-1] == segments.num_tokens and bounds == sorted(bounds)
    assert covers, f"cu_seqlens must rise from 0 to {segments.num_tokens}, the number of log-probs"
    for quantity, values in () if all(map(math.isfinite, largest)) else inputs.items():
        if not values.detach().isfinite().all():
            raise _first_non_finite(quantity, values, segments, sequence_ids)


def abs_max(values: torch.Tensor) -> torch.Tensor:
    """Largest magnitude, 0-d: 0 of nothing, NaN if any is NaN. (`isfinite` on every element costs ten times as much.)"""
    if values.numel() == 0:
        return values.new_zeros(())
    low, high = values.detach().aminmax()
    return torch.maximum(high, -low)


def _first_non_finite(
    quantity: str, values: torch.Tensor, segments: Segments, sequence_ids: Sequence[object] | None
) -> NonFiniteLogProbError:
    index = int((~values.detach().isfinite()).nonzero()[0])
    if len(values) == segments.num_tokens:
        response, token = segments.locate(index)
    else:
        response, token = index, None
    name = response if sequence_ids is None else sequence_ids[response]
    return NonFiniteLogProbError(quantity, float(values[index]), name, token)
