"""Routing Replay (§5.3): what a router is answered, and the proof that every answer was given exactly as often as due.

In: the micro-batches that are about to pass through the model and, for replay, the routes that an earlier pass (R2) or
the rollout engine (R3) chose for them. Out: for every router call the experts to activate and their live scores; after the
pass, what the routers chose, or would have chosen, by themselves, and how many tokens were replayed.

Only the indices are replayed. The scores are the live router's, gathered at those indices, so the router keeps its
gradient: d loss / d scores flows through the gather to exactly the experts that ran.

A router is asked once a micro-batch, and once more where the layer is recomputed for the backward pass. The second time
it is given the same experts again, also while recording: rounding must not let the backward pass differentiate another
network than the forward pass ran.

Shape legend: S tokens of a packed micro-batch that this rank's routers see, E experts, K activated experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_gspo.routing.change import check_routes
from megatron_gspo.routing.record import MicroBatchRoutes, RoutingLayout, RoutingReplayError
from megatron_gspo.types import MicroBatch

#: The router's own choice: scores [S, E] -> the K largest [S, K], in descending order, and their experts [S, K] int64
TopK = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ReplayCounts:
    """How tokens were routed, in tokens times router calls (a recomputed call counts again). Padding is not counted."""

    num_replayed: int = 0
    num_live: int = 0  # as the live router chose: tokens without a route, and all tokens where nothing is replayed

    @property
    def num_tokens(self) -> int:
        """All of them."""
        return self.num_replayed + self.num_live

    def __add__(self, other: ReplayCounts) -> ReplayCounts:
        """The counts of both passes."""
        return ReplayCounts(self.num_replayed + other.num_replayed, self.num_live + other.num_live)


class RoutingSession:
    """One pass of micro-batches through a model whose routers ask here.

    Without `replayed` the routers choose and are recorded. With it they are given those routes, and `note_natural` says
    whether what they would have chosen, given the same scores, is noted beside.
    """

    def __init__(
        self,
        layout: RoutingLayout,
        micro_batches: Sequence[MicroBatch],
        *,
        replayed: Sequence[MicroBatchRoutes] | None,
        note_natural: bool,
        margins: bool,
        on_host: bool,
    ) -> None:
        self._layout = layout
        self._position = {id(micro_batch.segment_cu_seqlens): i for i, micro_batch in enumerate(micro_batches)}
        if len(self._position) < len(micro_batches):
            raise RoutingReplayError("a micro-batch is in the list twice; its routes could not be told apart")
        self._micro_batches = tuple(micro_batches)  # kept alive, so that no other tensor gets the id of one of theirs
        self._ledger = CallLedger(layout.rank_layers, len(micro_batches))
        self._replayed = None if replayed is None else _PlannedReplay(layout, micro_batches, replayed)
        self._shows_natural = note_natural
        self._natural = [
            MicroBatchRoutes.room_for(layout, micro_batch, on_host=on_host, margins=margins)
            for micro_batch in (micro_batches if self._needs_natural() else ())
        ]
        self._num_counted_tokens = [int(counted_tokens(layout, micro_batch).sum()) for micro_batch in micro_batches]
        self._counts = ReplayCounts()
        self._complete = False

    @property
    def natural_routes(self) -> list[MicroBatchRoutes]:
        """What the routers chose, or under replay would have chosen, for each micro-batch.

        Under replay that is along the replayed path: a layer's scores come from tokens that took the replayed experts in
        the layers before it.

        Raises:
            RoutingReplayError: the session is not over, ended early, or was not to note them.
        """
        if not self._complete:
            raise RoutingReplayError(
                "routes can be read when the pass that chooses them is over; it is not, or it failed"
            )
        if not self._shows_natural:
            raise RoutingReplayError("this replay was not asked to note what the routers would have chosen")
        return self._natural

    @property
    def counts(self) -> ReplayCounts:
        """How tokens were routed so far."""
        return self._counts

    def position_of(self, segment_cu_seqlens: Tensor | None) -> int:
        """Which micro-batch has this very tensor of segment bounds.

        Raises:
            RoutingReplayError: none of the session's.
        """
        position = self._position.get(id(segment_cu_seqlens))
        if position is None:
            raise RoutingReplayError(
                "a micro-batch passes through the model that is none of those being recorded or replayed"
            )
        return position

    def expect_pass(self, layers: range, position: int, *, recomputed: bool) -> None:
        """A forward pass of micro-batch `position` through a chunk begins, whose MoE layers are `layers` of this rank's.

        Raises:
            RoutingReplayError: it has passed through them before.
        """
        self._ledger.expect(layers, position, 2 if recomputed else 1)

    def route(self, layer: int, position: int, scores: Tensor, top_k: TopK) -> tuple[Tensor, Tensor]:
        """Answer one router: the scores [S, K] of the experts to activate, with gradient, and the experts, int64.

        Args:
            layer: which of this rank's MoE layers asks, from 0.
            position: of the micro-batch that is passing through.
            scores: [S, E] of the live router: logits, or probabilities where it normalises before choosing.
            top_k: how the router would choose.

        Raises:
            RoutingReplayError: an answer too many, or scores for another number of tokens.
        """
        is_first = self._ledger.count(layer, position)
        num_tokens = self._layout.num_tokens_here(self._micro_batches[position])
        if scores.shape != (num_tokens, self._layout.num_experts):
            raise RoutingReplayError(
                f"{self._ledger.name(layer, position)}: the router scores [tokens, experts] {list(scores.shape)}, "
                f"but the routes are for {[num_tokens, self._layout.num_experts]}"
            )
        if self._replayed is None:
            return self._record(layer, position, scores, top_k, is_first=is_first)
        return self._replay(self._replayed, layer, position, scores, top_k, is_first=is_first)

    def finish(self) -> None:
        """The pass is over without an exception.

        Raises:
            RoutingReplayError: a router was not asked as often as it should have been.
        """
        self._ledger.check_complete()
        if any(routes.by_layer.is_pinned() for routes in self._natural):
            # Copies to the host are on their way; who reads them there must not be early.
            torch.cuda.current_stream().synchronize()
        self._complete = True

    def _needs_natural(self) -> bool:
        """Whether the routers' own choice is kept: also where tokens without a route are to take it, and again when
        recomputed."""
        has_gaps = self._replayed is not None and any(entry is not None for entry in self._replayed.has_route)
        return self._shows_natural or has_gaps

    def _record(
        self, layer: int, position: int, scores: Tensor, top_k: TopK, *, is_first: bool
    ) -> tuple[Tensor, Tensor]:
        self._counts += ReplayCounts(num_live=self._num_counted_tokens[position])
        if not is_first:
            experts = self._natural[position].load(layer, scores.device)
            return scores.gather(1, experts), experts
        values, experts = top_k(scores)
        self._note(layer, position, scores, values, experts)
        return values, experts

    def _replay(
        self, plan: _PlannedReplay, layer: int, position: int, scores: Tensor, top_k: TopK, *, is_first: bool
    ) -> tuple[Tensor, Tensor]:
        self._counts += plan.counts[position]
        experts = plan.routes[position].load(layer, scores.device)
        has_route = plan.has_route[position]
        if is_first and self._natural:
            self._note(layer, position, scores, *top_k(scores.detach()))
        if has_route is not None:
            live = self._natural[position].load(layer, scores.device)
            experts = torch.where(has_route[:, None], experts, live)
        return scores.gather(1, experts), experts

    def _note(self, layer: int, position: int, scores: Tensor, values: Tensor, experts: Tensor) -> None:
        """Keep the router's own choice."""
        routes = self._natural[position]
        routes.store(layer, experts)
        if routes.margins_by_layer is not None:
            routes.store_margins(layer, router_margin(scores.detach(), values.detach(), experts))


class CallLedger:
    """How often each router was asked for each micro-batch, against how often it should be."""

    def __init__(self, layer_numbers: Sequence[int], num_micro_batches: int) -> None:
        self._layer_numbers = layer_numbers
        self._num_micro_batches = num_micro_batches
        self._expected = [[0] * num_micro_batches for _ in layer_numbers]
        self._asked = [[0] * num_micro_batches for _ in layer_numbers]

    def name(self, layer: int, position: int) -> str:
        """How an error calls a layer and a micro-batch."""
        return f"layer {self._layer_numbers[layer]}, micro-batch {position}"

    def expect(self, layers: Iterable[int], position: int, num_calls: int) -> None:
        """From now on each of `layers` should be asked `num_calls` times for micro-batch `position`."""
        for layer in layers:
            if self._expected[layer][position]:
                raise RoutingReplayError(f"{self.name(layer, position)}: it passes through the layer a second time")
            self._expected[layer][position] = num_calls

    def count(self, layer: int, position: int) -> bool:
        """Count one call; whether it is the first (and not a recomputation)."""
        self._asked[layer][position] += 1
        asked, expected = self._asked[layer][position], self._expected[layer][position]
        if asked > expected:
            raise RoutingReplayError(
                f"{self.name(layer, position)}: the router asks {_times(asked)}; {_times(expected)} was expected"
            )
        return asked == 1

    def check_complete(self) -> None:
        """Raise unless every router was asked, for every micro-batch, exactly as often as it should have been."""
        incomplete = [
            (layer, position)
            for layer in range(len(self._layer_numbers))
            for position in range(self._num_micro_batches)
            if self._asked[layer][position] != max(self._expected[layer][position], 1)
        ]
        if incomplete:
            layer, position = incomplete[0]
            asked, expected = self._asked[layer][position], max(self._expected[layer][position], 1)
            raise RoutingReplayError(
                f"{self.name(layer, position)}: the router asked {_times(asked)}, {_times(expected)} was expected; "
                f"so it is for {len(incomplete)} of {len(self._layer_numbers) * self._num_micro_batches} "
                "pairs of layer and micro-batch"
            )


class _PlannedReplay:
    """Routes that fit their micro-batches, with what every router call of a micro-batch would look up again."""

    def __init__(
        self, layout: RoutingLayout, micro_batches: Sequence[MicroBatch], routes: Sequence[MicroBatchRoutes]
    ) -> None:
        if len(routes) != len(micro_batches):
            raise RoutingReplayError(f"there are routes of {len(routes)} micro-batches for {len(micro_batches)}")
        self.routes = tuple(routes)
        self.has_route: list[Tensor | None] = []  # of each micro-batch: [S] bool on the model's device
        self.counts: list[ReplayCounts] = []  # of each micro-batch, a router call
        for position, (micro_batch, entry) in enumerate(zip(micro_batches, routes, strict=True)):
            _check_fits(layout, position, micro_batch, entry)
            counted = counted_tokens(layout, micro_batch)
            num_tokens = num_replayed = int(counted.sum())
            if entry.has_route is not None:
                num_replayed = int((counted.cpu() & entry.has_route).sum())
            self.counts.append(ReplayCounts(num_replayed, num_tokens - num_replayed))
            self.has_route.append(None if entry.has_route is None else entry.has_route.to(micro_batch.token_ids.device))


def router_margin(scores: Tensor, values: Tensor, experts: Tensor) -> Tensor:
    """K-th largest score minus the K+1-th, [S] float32; infinite where every expert is chosen.

    The K+1-th is the largest of those not chosen. A top-(K + 1) would give both, but its first K need not be, among equal
    scores, the K that a top-K chooses: measuring would change what is measured.

    Args:
        scores: [S, E].
        values, experts: [S, K], the chosen scores and experts.
    """
    rest = scores.scatter(1, experts, -torch.inf).amax(1)
    return (values.amin(1) - rest).float()


def counted_tokens(layout: RoutingLayout, micro_batch: MicroBatch) -> Tensor:
    """Which of the tokens that this rank's routers see are no padding: [S] bool."""
    return micro_batch.is_sample_token[layout.token_positions(micro_batch)]


def _check_fits(layout: RoutingLayout, position: int, micro_batch: MicroBatch, routes: MicroBatchRoutes) -> None:
    tokens = layout.num_tokens_here(micro_batch)
    expected = (len(layout.rank_layers), tokens, layout.top_k)
    if tuple(routes.by_layer.shape) != expected or routes.by_layer.dtype != layout.dtype:
        raise RoutingReplayError(
            f"layers {list(layout.rank_layers)}, micro-batch {position}: [layers, tokens, experts] must be "
            f"{list(expected)} {layout.dtype}, but the routes are {list(routes.by_layer.shape)} {routes.by_layer.dtype}"
        )
    try:
        check_routes(routes.experts, layout.num_experts, layers=layout.rank_layers, name=f"micro-batch {position}")
    except ValueError as error:
        raise RoutingReplayError(str(error)) from error
    if routes.has_route is not None and routes.has_route.shape != (tokens,):
        raise RoutingReplayError(
            f"micro-batch {position}: {len(routes.has_route)} tokens are marked as with or without a route, of {tokens}"
        )


def _times(count: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(count, f"{count} times")
