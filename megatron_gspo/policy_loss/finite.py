"""The door of the policy loss: a log-prob, old log-prob or advantage that is not finite is refused by name.

One NaN among a million tokens makes every parameter NaN at the next update, and nothing in the loss says which response
brought it. Looking costs one maximum over each input and one wait for the device.
"""

from __future__ import annotations

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
    inputs: Mapping[str, torch.Tensor], segments: Segments, sequence_ids: Sequence[object] | None
) -> None:
    """Return when every value of `inputs` (name -> [T] or [N]) is finite and the segments cover the tokens.

    Raises:
        NonFiniteLogProbError: for the first value that is not finite.
    """
    cu_seqlens = segments.cu_seqlens
    covers = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == segments.num_tokens) & (segments.lengths >= 0).all()
    finite = torch.stack([abs_max(values).isfinite() for values in inputs.values()])
    segments_cover_tokens, *inputs_are_finite = torch.cat([covers.view(1), finite]).tolist()
    assert segments_cover_tokens, f"cu_seqlens must rise from 0 to {segments.num_tokens}, the number of log-probs"
    for (quantity, values), is_finite in zip(inputs.items(), inputs_are_finite, strict=True):
        if not is_finite:
            raise _first_non_finite(quantity, values, segments, sequence_ids)


def abs_max(values: torch.Tensor) -> torch.Tensor:
    """Largest magnitude, 0-d: 0 of nothing, NaN if any is NaN. (`isfinite` on every element costs ten times as much.)"""
    return values.detach().abs().amax() if values.numel() > 0 else values.new_zeros(())


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
