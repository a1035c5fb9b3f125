"""What the ranks of test_routing_replay.py run: passes under a parallel layout, live, recorded and replayed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_gspo import parallel
from megatron_gspo.config import ParallelSection
from megatron_gspo.model.build import build_policy
from megatron_gspo.model.hf_weights import load_hf_weights
from megatron_gspo.routing.engine_routes import routes_of_responses
from megatron_gspo.routing.record import MicroBatchRoutes
from megatron_gspo.routing.tap import RoutingTaps
from megatron_gspo.types import MicroBatch
from tests.distributed.model_on_ranks import LENGTHS, forward_and_backward, trainable
from tests.routed_models import as_sets, update, watched_routers
from tests.tiny_models import micro_batch, model_section, sequences

PADDED_TO = 8  # so that some micro-batches end with padding


def routes_of_one_rank(checkpoint: str) -> list[torch.Tensor]:
    """The routes of every micro-batch in a model in one piece, [S, all MoE layers, K] int64."""
    wrapped, taps = tapped_policy(checkpoint, ParallelSection(distributed_optimizer=False), recompute="none")
    batches = own_micro_batches()
    with taps.record(batches) as session:
        forward_and_backward(wrapped, batches)
    return [routes.experts.long() for routes in session.natural_routes]


def record_and_replay(
    checkpoint: str, layout: dict[str, Any], recompute: str, engine_routes: list[list[list[Any]]]
) -> dict[str, Any]:
    """Hold recorded and replayed passes against live ones; returns where what was recorded belongs in the whole.

    `engine_routes` are those of every micro-batch's samples, as a rollout engine would return them.
    """
    wrapped, taps = tapped_policy(checkpoint, ParallelSection(**layout, distributed_optimizer=False), recompute)
    batches = own_micro_batches()
    live = one_pass(wrapped, batches)
    with taps.record(batches, margins=True) as old:
        assert_bit_equal(one_pass(wrapped, batches), live)
    with taps.replay(old.natural_routes, batches, note_natural=True) as replay:
        assert_bit_equal(one_pass(wrapped, batches), live)
    assert_same_routes(replay.natural_routes, old.natural_routes)

    first = parallel.data_rank() * len(batches)
    from_engine = [
        routes_of_responses(taps.layout, batch, [np.array(routes, dtype=np.int32) for routes in samples])
        for batch, samples in zip(batches, engine_routes[first:], strict=False)
    ]
    with taps.replay(from_engine, batches) as engine_replay:
        assert_bit_equal(one_pass(wrapped, batches), live)

    update([chunk.module for chunk in wrapped])
    check_old_experts_run(wrapped, taps, old.natural_routes, batches, recompute)
    return {
        "first_micro_batch": first,
        "layer_indices": taps.layout.rank_layer_indices,
        "routes": [routes.experts.long() for routes in old.natural_routes],
        "token_positions": [taps.layout.token_positions(batch) for batch in batches],
        "replayed": [replay.counts.num_replayed, replay.counts.num_live],
        "replayed_from_engine": [engine_replay.counts.num_replayed, engine_replay.counts.num_live],
    }


def tapped_policy(
    checkpoint: str, sizes: ParallelSection, recompute: str
) -> tuple[list[DistributedDataParallel], RoutingTaps]:
    parallel.initialize_model_parallel(sizes, seed=3)
    chunks = build_policy(Path(checkpoint), model_section(recompute=recompute), sizes)
    load_hf_weights(chunks, Path(checkpoint))
    wrapped, _ = trainable(chunks, sizes)
    return wrapped, RoutingTaps(chunks)


def own_micro_batches() -> list[MicroBatch]:
    """This data-parallel rank's part of all micro-batches."""
    per_rank = len(LENGTHS) // parallel.data_size()
    first = parallel.data_rank() * per_rank
    return [
        micro_batch(sequences(LENGTHS[index], seed=index), pad_to_multiple=PADDED_TO)
        for index in range(first, first + per_rank)
    ]


def one_pass(chunks: list[DistributedDataParallel], batches: list[MicroBatch]) -> list[torch.Tensor]:
    """Log-probs (on the last stage) and every gradient of this rank."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    log_probs = forward_and_backward(chunks, batches)
    return log_probs + [parameter.main_grad.clone() for chunk in chunks for parameter in chunk.parameters()]


def check_old_experts_run(
    chunks: list[DistributedDataParallel],
    taps: RoutingTaps,
    old: Sequence[MicroBatchRoutes],
    batches: list[MicroBatch],
    recompute: str,
) -> None:
    """After an update, every router call activates a recorded set of experts, each as often as it is due."""
    with (
        taps.replay(old, batches, note_natural=True) as session,
        watched_routers(*(chunk.module for chunk in chunks)) as calls,
    ):
        one_pass(chunks, batches)
    calls_each = 2 if recompute == "full" else 1
    for index, number in enumerate(taps.layout.rank_layers):
        activated = [experts.tolist() for layer, experts in calls if layer == number]
        due = [as_sets(routes.by_layer[index]).tolist() for routes in old] * calls_each
        assert sorted(activated) == sorted(due)
        assert any(
            not torch.equal(as_sets(natural.by_layer[index]), as_sets(routes.by_layer[index]))
            for natural, routes in zip(session.natural_routes, old, strict=True)
        )


def assert_bit_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


def assert_same_routes(found: Sequence[MicroBatchRoutes], expected: Sequence[MicroBatchRoutes]) -> None:
    assert all(torch.equal(a.by_layer, b.by_layer) for a, b in zip(found, expected, strict=True))
