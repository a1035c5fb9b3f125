"""The rollout engine's routes lie along the packed tokens, in this rank's layers, and nothing about them is assumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_gspo import parallel
from megatron_gspo.config import ParallelSection
from megatron_gspo.data.packing import pack
from megatron_gspo.routing.engine_routes import routes_of_responses
from megatron_gspo.routing.record import MicroBatchRoutes, RoutingLayout, RoutingReplayError
from megatron_gspo.routing.replay import ReplayCounts
from megatron_gspo.routing.tap import RoutingTaps
from megatron_gspo.types import MicroBatch
from tests.routed_models import (
    LENGTHS,
    assert_bit_equal,
    forward,
    forward_and_backward,
    micro_batches,
    policy_model,
    update,
)
from tests.tiny_models import micro_batch, sequences

LAYOUT = RoutingLayout(moe_layers=(2, 4, 5), rank_layers=(2, 4, 5), num_experts=300, top_k=2)


def engine_routes(lengths: tuple[int, ...], layout: RoutingLayout = LAYOUT) -> list[np.ndarray]:
    """Random routes of one response a length, as an engine returns them."""
    generator = np.random.default_rng(0)
    return [
        np.argsort(generator.random((length - 1, len(layout.moe_layers), layout.num_experts)))[..., : layout.top_k]
        for length in lengths
    ]


def packed(lengths: tuple[int, ...], pad_to_multiple: int = 1) -> MicroBatch:
    batch = micro_batch(sequences(lengths), prompt_tokens=1, pad_to_multiple=pad_to_multiple)
    return replace(batch, sample_indices=tuple(70 + index for index in range(len(lengths))))


def as_the_engine_returns_them(routes: MicroBatchRoutes, lengths: tuple[int, ...]) -> list[np.ndarray]:
    """The trainer's routes of a micro-batch as if the engine had chosen them."""
    of_samples = routes.experts[: sum(lengths)].numpy().astype(np.int32)
    return [entry[:-1] for entry in np.split(of_samples, np.cumsum(lengths)[:-1])]


@given(
    lengths=st.lists(st.integers(2, 7), min_size=1, max_size=4).map(tuple),
    num_shards=st.integers(1, 3),
    own_layers=st.sets(st.sampled_from(LAYOUT.moe_layers)).map(sorted).map(tuple),
)
def test_every_token_but_a_samples_last_has_its_own_routes(
    lengths: tuple[int, ...], num_shards: int, own_layers: tuple[int, ...]
):
    batch, given_routes = packed(lengths, pad_to_multiple=num_shards), engine_routes(lengths)
    layouts = [
        replace(LAYOUT, rank_layers=own_layers, token_shard=shard, num_token_shards=num_shards)
        for shard in range(num_shards)
    ]
    shards = [routes_of_responses(layout, batch, given_routes) for layout in layouts]
    experts = torch.cat([shard.experts for shard in shards]).long()
    has_route = torch.cat([shard.has_route for shard in shards])
    assert len(experts) == len(has_route) == len(batch.token_ids)
    token = 0
    for length, routes in zip(lengths, given_routes, strict=True):
        own = torch.from_numpy(routes)[:, [LAYOUT.moe_layers.index(number) for number in own_layers]]
        assert torch.equal(experts[token : token + length - 1], own)
        assert has_route[token : token + length].tolist() == [True] * (length - 1) + [False]
        token += length
    assert not has_route[token:].any()
    placeholders = experts[~has_route]
    assert torch.equal(placeholders, torch.arange(2).expand_as(placeholders))  # distinct, so no token gets one twice


@pytest.fixture
def _one_rank() -> None:
    parallel.initialize_distributed()
    parallel.initialize_model_parallel(ParallelSection(), seed=1)


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("on_host", [False, True], ids=["on the device", "on the host"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_an_engine_that_routes_as_the_trainer_does_leaves_everything_bit_equal(recompute: str, on_host: bool):
    policy, batches = policy_model(recompute=recompute), micro_batches(pad_to_multiple=8)
    live = forward_and_backward(policy, batches)
    taps = RoutingTaps([policy])
    with taps.record(batches) as session:
        forward(policy, batches)
    routes = [
        routes_of_responses(taps.layout, batch, as_the_engine_returns_them(own, lengths), on_host=on_host)
        for batch, own, lengths in zip(batches, session.natural_routes, LENGTHS, strict=True)
    ]
    with taps.replay(routes, batches) as replay:
        assert_bit_equal(forward_and_backward(policy, batches), live)
    num_calls = 4 * (2 if recompute == "full" else 1)
    assert replay.counts == ReplayCounts(num_replayed=(45 - 7) * num_calls, num_live=7 * num_calls)  # 7 last tokens


@pytest.mark.usefixtures("_one_rank")
def test_the_engines_experts_run_even_where_the_trainer_would_choose_others():
    policy, batches = policy_model(), micro_batches()
    taps = RoutingTaps([policy])
    with taps.record(batches) as session:
        log_probs = forward(policy, batches)
    update([policy])
    after_update = forward(policy, batches)
    routes = [
        routes_of_responses(taps.layout, batch, as_the_engine_returns_them(own, lengths))
        for batch, own, lengths in zip(batches, session.natural_routes, LENGTHS, strict=True)
    ]
    with taps.replay(routes, batches, note_natural=True) as replay:
        replayed = forward(policy, batches)
    assert not any(map(torch.equal, replayed, log_probs))
    assert not any(map(torch.equal, replayed, after_update))
    disagreeing = [
        (own.experts.long().sort(-1).values != natural.experts.long().sort(-1).values).any()
        for own, natural in zip(session.natural_routes, replay.natural_routes, strict=True)
    ]
    assert all(disagreeing)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_any_integer_type_is_taken_and_read_only_memory_too(dtype: type[np.generic]):
    lengths = (4, 6)
    as_sent = [routes.astype(dtype) for routes in engine_routes(lengths)]
    for routes in as_sent:
        routes.flags.writeable = False
    found = routes_of_responses(LAYOUT, packed(lengths), as_sent)
    assert found.by_layer.dtype == torch.uint16
    expected = torch.from_numpy(as_sent[0].astype(np.int64))
    assert torch.equal(found.experts[:3].long(), expected)
    assert expected.max() > 255


def test_a_micro_batch_without_responses_has_only_tokens_without_a_route():
    batch = pack([], pad_to_multiple=2, pad_token_id=0, device="cpu")
    routes = routes_of_responses(LAYOUT, batch, [])
    assert routes.experts.shape == (2, 3, 2)
    assert not routes.has_route.any()


def changed(change: Callable[[np.ndarray], np.ndarray | None]) -> list[np.ndarray | None]:
    """Routes of two responses, the second one's changed."""
    first, second = engine_routes((4, 6))
    return [first, change(second)]


def with_entry(token: int, layer: int, experts: tuple[int, int]) -> Callable[[np.ndarray], np.ndarray]:
    def change(routes: np.ndarray) -> np.ndarray:
        routes[token, layer] = experts
        return routes

    return change


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        pytest.param(changed(lambda routes: None), "sample 71: .* no routes", id="missing"),
        pytest.param(
            changed(lambda routes: routes[:3]), r"sample 71: .*\[3, 3, 2\].* 6 tokens .*\[5, 3, 2\]", id="short"
        ),
        pytest.param(
            changed(lambda routes: np.concatenate([routes, routes[:1]])), r"sample 71: .*\[6, 3, 2\]", id="surplus"
        ),
        pytest.param(
            changed(lambda routes: routes.repeat(2, axis=1)), r"sample 71: .*\[5, 6, 2\]", id="dense layers counted"
        ),
        pytest.param(changed(lambda routes: routes[..., :1]), r"sample 71: .*\[5, 3, 1\]", id="another top-k"),
        pytest.param(changed(lambda routes: routes.reshape(5, 6)), r"sample 71: .*\[5, 6\]", id="flattened"),
        pytest.param(changed(lambda routes: routes.astype(float)), "sample 71: expected integers", id="no integers"),
        pytest.param(
            changed(with_entry(2, 1, (7, 300))), "sample 71: token 2 in MoE layer 4 .* expert 300", id="out of range"
        ),
        pytest.param(
            changed(with_entry(4, 2, (-1, 7))), "sample 71: token 4 in MoE layer 5 .* expert -1", id="minus one"
        ),
        pytest.param(
            changed(with_entry(0, 0, (0, 0))), "sample 71: token 0 in MoE layer 2 .* twice", id="padded with zeros"
        ),
        pytest.param(engine_routes((4,)), "routes of 1 responses, .* has 2", id="a response short"),
        pytest.param(engine_routes((4, 6, 5)), "routes of 3 responses, .* has 2", id="a response too many"),
    ],
)
def test_routes_that_are_not_the_responses_are_refused_naming_the_sample(routes: list[np.ndarray | None], message: str):
    with pytest.raises(RoutingReplayError, match=message):
        routes_of_responses(LAYOUT, packed((4, 6)), routes)
