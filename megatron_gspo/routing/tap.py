"""The tap in Megatron's routers: how a router's question finds the answer meant for it.

In: the chunks of a model on this rank. Out: `RoutingTaps`, whose `record` and `replay` put a `RouterTap` into each
`TopKRouter.router_replay`, the place Megatron-Core 0.16.1 asks for the top-k (moe/moe_utils.py), for the length of a
`with` block:

    taps = RoutingTaps(chunks)
    with taps.record(micro_batches) as old:
        ...  # forward, and backward if wanted, under any pipeline schedule
    with taps.replay(old.natural_routes, micro_batches, note_natural=True) as new:
        ...

Outside such a block the model is untouched: off costs nothing and is what a model without taps computes. Nothing is
process-global: taps belong to the chunks they were made for, and a reference model or a rebuilt one has nothing of them.

Which micro-batch a router asks for is not guessed from the order of calls, which pipeline schedules interleave and
recomputation repeats. It travels with the tensors: every layer is handed the packed sequence's description, in the
forward pass and, from the checkpoint's closure, in the recomputation; in it is the micro-batch's own tensor of segment
bounds, and by that object the micro-batch is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_gspo.context_parallel import ContextShare
from megatron_gspo.routing.record import MicroBatchRoutes, RoutingLayout, RoutingReplayError
from megatron_gspo.routing.replay import RoutingSession
from megatron_gspo.types import MicroBatch

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayer


class RouterTap:
    """Sits between the router of one MoE layer and its top-k while a session is open."""

    def __init__(self, session: RoutingSession, layer: int) -> None:
        self._session = session
        self._layer = layer
        self._position: int | None = None  # of the micro-batch inside the transformer layer right now

    def before_layer(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward pre-hook of the transformer layer: note which micro-batch enters."""
        del module, args
        self._position = self._session.position_of(_segment_bounds(kwargs))

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """What Megatron calls: scores [S, E] to the scores and indices of the experts to activate, [S, topk] each."""
        position, self._position = self._position, None
        assert position is not None, "the router is asked inside its transformer layer, once"
        return self._session.route(
            self._layer, position, scores, lambda live: default_compute_topk(live, topk, num_groups, group_topk)
        )


class RoutingTaps:
    """Records and replays the routing of one model's chunks on this rank."""

    def __init__(self, chunks: Sequence[GPTModel]) -> None:
        """Find the routers of `chunks`: all of this rank's, without a data-parallel wrapper. They are left as they are.

        Raises:
            RoutingReplayError: the model has no routers, or is configured so that they would not ask.
        """
        self._chunks = tuple(chunks)
        config = self._chunks[0].config
        _check_routers_ask(config)
        self._layers: list[TransformerLayer] = []  # this rank's MoE layers
        self._chunk_layers: list[range] = []  # of each chunk: which of `_layers` are in it
        for chunk in self._chunks:
            first = len(self._layers)
            self._layers += [layer for layer in chunk.decoder.layers if layer.is_moe_layer]
            self._chunk_layers.append(range(first, len(self._layers)))
        groups = self._chunks[0].pg_collection
        self.layout = RoutingLayout(
            moe_layers=moe_layer_numbers(config),
            rank_layers=tuple(layer.layer_number for layer in self._layers),
            num_experts=config.num_moe_experts,
            top_k=config.moe_router_topk,
            context=ContextShare(groups.cp.rank(), groups.cp.size()),
            token_shard=groups.tp.rank() if config.sequence_parallel else 0,
            num_token_shards=groups.tp.size() if config.sequence_parallel else 1,
        )
        self._recomputes = config.recompute_granularity == "full"

    @contextmanager
    def record(
        self, micro_batches: Sequence[MicroBatch], *, margins: bool = False, on_host: bool = False
    ) -> Iterator[RoutingSession]:
        """Record what the routers choose while each of `micro_batches` passes through the model exactly once.

        Afterwards the session's `natural_routes` has one entry a micro-batch. A backward pass belongs inside the block.

        Args:
            margins: also each router's margin, the K-th largest score minus the K+1-th.
            on_host: keep the record in host memory (pinned, where the model is on a GPU).

        Raises:
            RoutingReplayError: on entry, if routing is being recorded or replayed already; later, if a micro-batch passes
                through that is not among `micro_batches`, or more than once; on leaving, if one did not.
        """
        session = RoutingSession(
            self.layout, micro_batches, replayed=None, note_natural=True, margins=margins, on_host=on_host
        )
        with self._attached(session):
            yield session

    @contextmanager
    def replay(
        self,
        routes: Sequence[MicroBatchRoutes],
        micro_batches: Sequence[MicroBatch],
        *,
        note_natural: bool = False,
        margins: bool = False,
        on_host: bool = False,
    ) -> Iterator[RoutingSession]:
        """Activate the experts of `routes`, one entry a micro-batch, while each of `micro_batches` passes through once.

        Gate values are the live routers'. A token without a route (`MicroBatchRoutes.has_route`) is routed live and
        counted. A backward pass belongs inside the block.

        Args:
            note_natural: also note what the routers would have chosen given the same scores; it costs a top-k.
            margins: with that, also each router's margin.
            on_host: keep those notes in host memory. Where `routes` are does not matter.

        Raises:
            RoutingReplayError: as `record`; and on entry, if `routes` do not fit `micro_batches`.
        """
        session = RoutingSession(
            self.layout, micro_batches, replayed=routes, note_natural=note_natural, margins=margins, on_host=on_host
        )
        with self._attached(session):
            yield session

    @contextmanager
    def _attached(self, session: RoutingSession) -> Iterator[None]:
        """Let every router ask `session`. Its books are checked at the end unless an exception is on its way out."""
        if any(layer.mlp.router.router_replay is not None for layer in self._layers):
            raise RoutingReplayError("the model's routing is being recorded or replayed already")
        hooks = []
        try:
            for index, layer in enumerate(self._layers):
                tap = RouterTap(session, index)
                layer.mlp.router.router_replay = tap
                hooks.append(layer.register_forward_pre_hook(tap.before_layer, with_kwargs=True))
            for chunk, layers in zip(self._chunks, self._chunk_layers, strict=True):
                hooks.append(
                    chunk.decoder.register_forward_pre_hook(self._expectation(session, layers), with_kwargs=True)
                )
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for layer in self._layers:
                layer.mlp.router.router_replay = None
        session.finish()

    def _expectation(self, session: RoutingSession, layers: range) -> Callable[..., None]:
        """A forward pre-hook of a chunk's layers together: expect their routers' calls."""

        def before_layers(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            del args
            # Only here can one tell: inside a checkpointed layer gradients are off in the forward pass either way.
            recomputed = self._recomputes and module.training and torch.is_grad_enabled()
            session.expect_pass(layers, session.position_of(_segment_bounds(kwargs)), recomputed=recomputed)

        return before_layers


def moe_layer_numbers(config: TransformerConfig) -> tuple[int, ...]:
    """Which layers of the whole model have experts, counted from 1."""
    pattern = config.moe_layer_freq
    if isinstance(pattern, int):
        return tuple(range(1, config.num_layers + 1, pattern))
    return tuple(number for number, is_moe in enumerate(pattern, start=1) if is_moe)


def _check_routers_ask(config: TransformerConfig) -> None:
    """Refuse what makes Megatron-Core 0.16.1 choose experts without asking, or ask where no micro-batch is known."""
    if config.num_moe_experts is None:
        raise RoutingReplayError("the model is dense: it has no routing to record or replay")
    full, selective = (config.recompute_granularity == granularity for granularity in ("full", "selective"))
    refused = {
        "moe_router_fusion": config.moe_router_fusion,  # moe_utils.py returns from the fused kernel before asking
        "moe_router_load_balancing_type sinkhorn": config.moe_router_load_balancing_type == "sinkhorn",  # never asks
        "moe_enable_routing_replay": config.moe_enable_routing_replay,  # Megatron's own, in the tap's place
        # Recomputes the experts with their router, outside the layer that is told its micro-batch.
        "recompute_modules moe": selective and "moe" in config.recompute_modules,
        "recompute_method block": full and config.recompute_method == "block",  # recomputes some layers and not others
        "overlap_moe_expert_parallel_comm": config.overlap_moe_expert_parallel_comm,  # calls the parts of layers singly
        "cuda_graph_impl": config.cuda_graph_impl != "none",  # runs kernels again without asking
    }
    for name, is_set in refused.items():
        if is_set:
            raise RoutingReplayError(f"routes can be neither recorded nor replayed with Megatron's {name}")


def _segment_bounds(kwargs: Mapping[str, Any]) -> Tensor | None:
    """The micro-batch's own tensor in the description of packed input that the model hands to every layer."""
    packed = kwargs.get("packed_seq_params")
    return None if packed is None else packed.cu_seqlens_q
