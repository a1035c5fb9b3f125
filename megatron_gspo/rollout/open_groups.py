"""Responses that take several calls, and perhaps several versions of the weights, to sample.

In: what was sampled of a response before, and what followed. Out: one response, each token with the log-prob and routes it
was sampled with, and with the version that sampled it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from megatron_gspo.types import OpenGroup, Prompt, Response


class Slot(NamedTuple):
    """The place of a response that has not come to its end."""

    group: int
    response: int
    prompt: Prompt
    so_far: Response | None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """What sampling goes on from: the prompt, and the response's tokens so far."""
        return self.prompt.token_ids + (() if self.so_far is None else tuple(self.so_far.token_ids.tolist()))

    @property
    def num_tokens(self) -> int:
        """Tokens of the response so far."""
        return 0 if self.so_far is None else len(self.so_far.token_ids)


def open_slots(groups: Sequence[OpenGroup]) -> list[Slot]:
    """What is to be sampled of `groups`, in order."""
    return [
        Slot(number, place, group.prompt, response)
        for number, group in enumerate(groups)
        for place, response in enumerate(group.responses)
        if response is None or response.finish_reason == "abort"
    ]


def filled(groups: Sequence[OpenGroup], sampled: Sequence[tuple[Slot, Response]]) -> list[OpenGroup]:
    """The groups, with each sampled response in its slot."""
    responses = [list(group.responses) for group in groups]
    for slot, response in sampled:
        responses[slot.group][slot.response] = response
    return [replace(group, responses=tuple(own)) for group, own in zip(groups, responses, strict=True)]


def joined(so_far: Response | None, sampled: Response, num_prompt_tokens: int) -> Response:
    """What was sampled, behind what was sampled before it.

    Args:
        so_far: the tokens that sampling went on from; None for none.
        sampled: the tokens after them. Its routes, if any, are of prompt and tokens so far too, which were run through
            the model again: [prompt + so far + sampled - 1, L, K].
        num_prompt_tokens: of the prompt alone.
    """
    if so_far is None:
        return sampled
    routes = None
    if so_far.routed_experts is not None and sampled.routed_experts is not None:
        # The last token so far was first run through the model to sample the token after it.
        known = num_prompt_tokens + len(so_far.token_ids) - 1
        assert len(so_far.routed_experts) == known, "the last token has no route"
        routes = np.concatenate([so_far.routed_experts, sampled.routed_experts[known:]])
    spans = so_far.version_spans
    if spans[-1].version == sampled.weight_version:
        spans = spans[:-1]
    return Response(
        prompt_id=sampled.prompt_id,
        token_ids=np.concatenate([so_far.token_ids, sampled.token_ids]),
        log_probs=np.concatenate([so_far.log_probs, sampled.log_probs]),
        finish_reason=sampled.finish_reason,
        weight_version=sampled.weight_version,
        routed_experts=routes,
        earlier=spans,
    )
