"""Routing Replay and the measurement of routes, pass by pass of a step (§5.3).

In: the step's micro-batches and, for R3, the rollout engine's routes. Out: context managers that the old-policy pass and
each update run in, which record or replay as the recipe asks; and counts of what they saw.

    replay   old-policy pass                      updates
    off      recorded, if measured                recorded, if measured, and compared with the old policy's
    r2       recorded                             the old policy's routes are replayed
    r3       the engine's routes are replayed     the engine's routes are replayed

No other pass replays: the reference policy is another model, and probes and evaluations run outside these contexts.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_gspo import parallel
from megatron_gspo.config import Recipe
from megatron_gspo.model.policy import PolicyModel
from megatron_gspo.platform import device
from megatron_gspo.routing.change import count_replaced, response_positions
from megatron_gspo.routing.engine_routes import routes_of_responses
from megatron_gspo.routing.record import MicroBatchRoutes, RoutingLayout
from megatron_gspo.routing.replay import ReplayCounts
from megatron_gspo.routing.tap import RoutingTaps
from megatron_gspo.routing.volatility import ReroutedTokens, RoutingChange, count_change, count_rerouted_tokens
from megatron_gspo.routing.volatility_metrics import (
    ENGINE_DISAGREEMENT,
    REPLAYED_PATH_CHANGE,
    ChangeNames,
    change_metrics,
    to_arrays,
)
from megatron_gspo.training.experience import Experience, MiniBatch
from megatron_gspo.training.staleness import is_current
from megatron_gspo.types import MicroBatch

#: Old policy against the routes that the updates' own forward passes took
UPDATE_CHANGE = ChangeNames("routing/update_change_rate", "routing/update_tokens_any_change")


@dataclass
class Comparison:
    """Routes of the same tokens measured twice, counted over micro-batches. Of ranks that share tokens, the first counts."""

    change: RoutingChange  # of this rank's layers
    rerouted: ReroutedTokens  # over all layers; counted on the last pipeline stage

    @classmethod
    def empty(cls, layout: RoutingLayout) -> Comparison:
        """Nothing compared yet."""
        return cls(
            change=RoutingChange.zeros(layout.rank_layers, layout.num_experts, layout.top_k, device=device()),
            rerouted=count_rerouted_tokens(torch.zeros(0, dtype=torch.int64, device=device())),
        )

    def add(
        self,
        layout: RoutingLayout,
        micro_batch: MicroBatch,
        old: torch.Tensor,
        new: torch.Tensor,
        old_margins: torch.Tensor | None = None,
        counted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Count a micro-batch's response tokens, [T, L, K] twice, or those of `counted` [T] bool.

        Returns the experts replaced in all layers, of each token that counts.
        """
        positions = response_positions(micro_batch.response_cu_seqlens)
        if counted is not None:
            old, new, positions = old[counted], new[counted], positions[counted]
            old_margins = None if old_margins is None else old_margins[counted]
        replaced = parallel.sum_over_stages(count_replaced(old, new).sum(1, dtype=torch.int64))
        if parallel.is_first_token_rank():
            self.change += count_change(
                old,
                new,
                num_experts=layout.num_experts,
                layers=layout.rank_layers,
                positions=positions,
                old_margin=old_margins,
            )
            if parallel.is_last_stage():
                self.rerouted += count_rerouted_tokens(replaced)
        return replaced

    def __add__(self, other: Comparison) -> Comparison:
        """The counts of both."""
        return Comparison(self.change + other.change, self.rerouted + other.rerouted)

    def over_ranks(self, layout: RoutingLayout) -> Comparison:
        """The counts of all ranks and layers, on every rank."""
        on_all_layers = self.change.on_layers(layout.moe_layers)
        change, rerouted = _summed([on_all_layers.to_vector(), self.rerouted.to_vector()])
        return Comparison(on_all_layers.from_vector(change), self.rerouted.from_vector(rerouted))

    def results(self, names: ChangeNames) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Metrics under `names`, and arrays prefixed with what the change rate is called.

        The rates by layer are among the arrays alone, except those of the measurement that a run is judged by.
        """
        metrics = change_metrics(self.change, self.rerouted, names)
        prefix = names.change_rate.removeprefix("routing/")
        arrays = {f"{prefix}/{name}": array for name, array in to_arrays(self.change).items()}
        return {name: value for name, value in metrics.items() if "_layer_" not in name}, arrays


@dataclass
class StepRoutes:
    """One step's routes on this rank, by mini-batch, and what its passes showed."""

    natural: list[list[MicroBatchRoutes]] | None = None  # the trainer's own choice under the old policy
    replayed: list[list[MicroBatchRoutes]] | None = None  # what the updates replay
    # old policy against the routes that each update's own forward pass chose (under replay: would have chosen), by
    # mini-batch; the first runs the old policy itself and has nothing to show
    updates: dict[int, Comparison] = field(default_factory=dict)
    engine: Comparison | None = None  # the rollout engine against the trainer, equal weights
    counts: ReplayCounts = field(default_factory=ReplayCounts)  # of the updates' routers
    num_tokens: int = 0  # that passed through the updates, padding not counted
    num_responses: int = 0

    def replayed_token_fraction(self, *, last_token_has_route: bool) -> float | None:
        """Tokens that were replayed, of those that should have been; over all ranks. None where no router was asked.

        The engine has no route for the last token of a response (R3), so that one should not have been.
        """
        counts_here = parallel.reports_metrics()
        measured = [self.counts.num_replayed, self.counts.num_tokens]
        passed = [self.num_tokens * counts_here, self.num_responses * counts_here]
        replayed, asked, tokens, responses = map(
            int, parallel.sum_over_all_ranks(torch.tensor([*measured, *passed], dtype=torch.int64)).tolist()
        )
        if asked == 0:
            return None
        calls_per_token, remainder = divmod(asked, tokens)  # one a MoE layer, and one more where it is recomputed
        assert remainder == 0, "every token is routed in every layer"
        return replayed / (asked - (0 if last_token_has_route else responses * calls_per_token))

    def live_token_fraction(self) -> float:
        """Tokens that the live router routed, of all that passed through the updates' routers; over all ranks."""
        counts = torch.tensor([self.counts.num_live, self.counts.num_tokens], dtype=torch.int64)
        live, asked = parallel.sum_over_all_ranks(counts).tolist()
        return live / asked


class RoutingControl:
    """Runs the policy's passes with its routers recorded or replayed, as the recipe's `routing` section says.

    Where that is neither (no replay and nothing measured), the routers are left alone and the contexts do nothing.
    """

    def __init__(self, models: Sequence[PolicyModel], recipe: Recipe) -> None:
        self.taps = RoutingTaps(models)
        self.layout = self.taps.layout
        self.replay = recipe.routing.replay
        self.measures = recipe.routing.measure
        self.on_host = recipe.routing.routes_on_host

    def begin_step(self, experience: Experience, mini_batches: Sequence[MiniBatch]) -> StepRoutes:
        """Under R3, lay the engine's routes out along the step's micro-batches.

        Raises:
            RoutingReplayError: a response came without routes, or they do not fit it.
        """
        routes = StepRoutes()
        if self.replay == "r3":
            experts = experience.routed_experts()
            routes.replayed = [
                [
                    routes_of_responses(
                        self.layout,
                        micro_batch,
                        [experts[index] for index in micro_batch.sample_indices],
                        on_host=self.on_host,
                    )
                    for micro_batch in mini_batch.micro_batches
                ]
                for mini_batch in mini_batches
            ]
        return routes

    @contextmanager
    def old_policy_pass(self, routes: StepRoutes, mini_batches: Sequence[MiniBatch]) -> Iterator[None]:
        """Around the forward pass of all of the step's micro-batches before any update."""
        flat = [micro_batch for mini_batch in mini_batches for micro_batch in mini_batch.micro_batches]
        if routes.replayed is not None:
            given = [entry for mini_batch in routes.replayed for entry in mini_batch]
            with self.taps.replay(given, flat, note_natural=self.measures, on_host=self.on_host) as session:
                yield
            if self.measures:
                routes.natural = _by_mini_batch(session.natural_routes, mini_batches)
                routes.engine = self._comparison(flat, given, session.natural_routes, equal_weights=True)
        elif self.replay == "r2" or self.measures:
            with self.taps.record(flat, margins=self.measures, on_host=self.on_host) as session:
                yield
            routes.natural = _by_mini_batch(session.natural_routes, mini_batches)
            if self.replay == "r2":
                routes.replayed = routes.natural
        else:
            yield

    @contextmanager
    def update_pass(self, routes: StepRoutes, number: int, mini_batch: MiniBatch) -> Iterator[None]:
        """Around the forward and backward passes of mini-batch `number`."""
        micro_batches = mini_batch.micro_batches
        # Without an old-policy pass the first update is where the engine's routes meet the trainer's at equal weights.
        meets_engine = self.measures and self.replay == "r3" and routes.natural is None and number == 0
        compares = meets_engine or (self.measures and routes.natural is not None)
        if routes.replayed is not None:
            context = self.taps.replay(
                routes.replayed[number], micro_batches, note_natural=compares, on_host=self.on_host
            )
        elif compares:
            context = self.taps.record(micro_batches, on_host=self.on_host)
        else:
            yield
            return
        with context as session:
            yield
        routes.counts += session.counts
        routes.num_responses += sum(micro_batch.num_responses for micro_batch in micro_batches)
        routes.num_tokens += sum(
            len(micro_batch.token_ids) - micro_batch.num_padding_tokens for micro_batch in micro_batches
        )
        if meets_engine:
            assert routes.replayed is not None, "the engine's"
            routes.engine = self._comparison(
                micro_batches, routes.replayed[number], session.natural_routes, equal_weights=True
            )
        elif compares and number > 0:
            assert routes.natural is not None, "what it compares with"
            routes.updates[number] = self._comparison(micro_batches, routes.natural[number], session.natural_routes)

    def results(self, routes: StepRoutes) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Metrics and arrays of a step's passes, of all ranks. Every rank takes part."""
        metrics: dict[str, float] = {}
        arrays: dict[str, np.ndarray] = {}
        fraction = routes.replayed_token_fraction(last_token_has_route=self.replay != "r3")
        # Without a session no router was tapped, and nothing can have been replayed.
        metrics["routing/replayed_token_fraction"] = 0.0 if fraction is None else fraction
        if fraction is not None:
            metrics["routing/bytes_per_token"] = float(self.layout.bytes_per_token)
            metrics["routing/live_token_fraction"] = routes.live_token_fraction()
        names = UPDATE_CHANGE if self.replay == "off" else REPLAYED_PATH_CHANGE
        measured = {
            names.suffixed(f"_mini_batch_{number + 1}"): comparison for number, comparison in routes.updates.items()
        }
        if routes.updates:
            measured[names] = functools.reduce(operator.add, routes.updates.values())
        if routes.engine is not None:
            measured[ENGINE_DISAGREEMENT] = routes.engine
        for measurement, comparison in measured.items():
            more_metrics, more_arrays = comparison.over_ranks(self.layout).results(measurement)
            metrics |= more_metrics
            arrays |= more_arrays
        return metrics, arrays

    def response_routes(
        self, micro_batch: MicroBatch, routes: MicroBatchRoutes
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Routes of the tokens that predict the response, in all of this rank's layers, on the model's device.

        Returns experts [T, L, K] int16 and margins [T, L] float32 (None where they were not recorded). Under context
        and sequence parallelism each rank's routers saw a part of the tokens: the parts are put together.
        """
        wanted = micro_batch.predicting_positions
        own = self.layout.token_positions(micro_batch)
        place = torch.full((len(micro_batch.token_ids),), -1, device=own.device)
        place[own] = torch.arange(len(own), device=own.device)
        local = place[wanted]
        here = local >= 0
        local = local[here]

        def whole(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            full = torch.zeros(len(wanted), *values.shape[1:], dtype=dtype, device=wanted.device)
            full[here] = values.to(device=wanted.device, dtype=dtype)[local]
            return parallel.sum_over_token_ranks(full) if self.layout.num_parts > 1 else full

        # gloo and NCCL add int32; narrowed afterwards, since comparing is faster the fewer bytes there are.
        experts = whole(routes.experts, torch.int32).to(torch.int16)
        return experts, None if routes.margins is None else whole(routes.margins, torch.float32)

    def _comparison(
        self,
        micro_batches: Sequence[MicroBatch],
        old: Sequence[MicroBatchRoutes],
        new: Sequence[MicroBatchRoutes],
        *,
        equal_weights: bool = False,
    ) -> Comparison:
        """Compare all response tokens, or with `equal_weights` those of responses that no other weights sampled."""
        comparison = Comparison.empty(self.layout)
        for micro_batch, old_routes, new_routes in zip(micro_batches, old, new, strict=True):
            old_experts, old_margins = self.response_routes(micro_batch, old_routes)
            new_experts, _ = self.response_routes(micro_batch, new_routes)
            counted = is_current(micro_batch) if equal_weights else None
            comparison.add(self.layout, micro_batch, old_experts, new_experts, old_margins, counted)
        return comparison


def _summed(vectors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Each of `vectors`, added up over all ranks with one collective, on the host."""
    total = parallel.sum_over_all_ranks(torch.cat(list(vectors))).cpu()
    return total.split([len(vector) for vector in vectors])


def _by_mini_batch(
    routes: Sequence[MicroBatchRoutes], mini_batches: Sequence[MiniBatch]
) -> list[list[MicroBatchRoutes]]:
    remaining = iter(routes)
    return [[next(remaining) for _ in mini_batch.micro_batches] for mini_batch in mini_batches]
