"""Routes of the rollout engine (R3), packed as the tokens they belong to.

In: for every response of a micro-batch the experts that the engine chose for its prompt and response, all MoE layers of
the model. Out: the micro-batch's routes in this rank's layers and for the tokens its routers see, checked, ready to be
replayed or compared with the trainer's own.

The engine never runs the last token of a response through the model, so that token has no route; neither has padding. Both
are marked, routed live and counted. Everything else that is missing is an error.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_gspo.routing.change import check_routes
from megatron_gspo.routing.record import MicroBatchRoutes, RoutingLayout, RoutingReplayError
from megatron_gspo.types import MicroBatch


def routes_of_responses(
    layout: RoutingLayout,
    micro_batch: MicroBatch,
    routed_experts: Sequence[np.ndarray | None],
    *,
    on_host: bool = False,
) -> MicroBatchRoutes:
    """Lay the engine's routes out along a packed micro-batch.

    Args:
        layout: what this rank keeps of them.
        micro_batch: its samples' prompts and responses are what the routes are of.
        routed_experts: `Response.routed_experts` of each sample, in packing order: [prompt + response - 1, all MoE layers
            of the model, K], any integer dtype.
        on_host: keep them in host memory (pinned, where the model is on a GPU).

    Raises:
        RoutingReplayError: naming the sample whose routes are missing, too few or too many, of another number of layers
            or experts, out of range, or name an expert twice for a token.
    """
    if len(routed_experts) != micro_batch.num_responses:
        raise RoutingReplayError(
            f"there are routes of {len(routed_experts)} responses, but the micro-batch has {micro_batch.num_responses}"
        )
    num_tokens = len(micro_batch.token_ids)
    is_sample_token = micro_batch.is_sample_token.cpu().numpy()
    # Tokens without a route hold the first K experts, which are never read.
    packed = np.empty((num_tokens, len(layout.rank_layers), layout.top_k), dtype=np.int32)
    packed[:] = np.arange(layout.top_k)
    has_route = np.zeros(num_tokens, dtype=bool)
    bounds = micro_batch.segment_cu_seqlens.tolist()
    for sample, experts, start, segment_end in zip(
        micro_batch.sample_indices,
        routed_experts,
        bounds,
        bounds[1:],
        strict=False,  # there may be a segment of padding alone
    ):
        end = start + int(is_sample_token[start:segment_end].sum())
        checked = _checked(layout, sample, experts, num_tokens=end - start)
        packed[start : end - 1] = checked[:, layout.rank_layer_indices]
        has_route[start : end - 1] = True
    own = layout.token_positions(micro_batch).cpu().numpy()
    routes = MicroBatchRoutes.room_for(layout, micro_batch, on_host=on_host, margins=False)
    routes.by_layer.copy_(torch.from_numpy(packed[own]).transpose(0, 1).to(layout.dtype))
    return MicroBatchRoutes(by_layer=routes.by_layer, has_route=torch.from_numpy(has_route[own]))


def _checked(layout: RoutingLayout, sample: int, experts: np.ndarray | None, *, num_tokens: int) -> np.ndarray:
    """The routes of one sample of `num_tokens`, as they came, if nothing is wrong with them."""
    if experts is None:
        raise RoutingReplayError(f"sample {sample}: the rollout engine returned no routes; they were to be replayed")
    expected = (num_tokens - 1, len(layout.moe_layers), layout.top_k)
    if experts.shape != expected:
        raise RoutingReplayError(
            f"sample {sample}: the rollout engine's routes are [tokens, layers, experts] {list(experts.shape)}; "
            f"a sequence of {num_tokens} tokens in this model has {list(expected)} (the last token has none)"
        )
    try:
        # A copy: what came over the wire may be read-only, which torch does not take.
        check_routes(
            torch.from_numpy(experts.copy()),
            layout.num_experts,
            layers=layout.moe_layers,
            name=f"the rollout engine's routes of sample {sample}",
        )
    except ValueError as error:
        raise RoutingReplayError(str(error)) from error
    return experts
