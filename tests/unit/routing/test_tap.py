"""The tap finds its routers and its micro-batches, leaves everything else alone, and notices what does not add up."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.router_replay import RouterReplay

from megatron_gspo import parallel
from megatron_gspo.config import ParallelSection
from megatron_gspo.routing.record import RoutingReplayError
from megatron_gspo.routing.tap import RoutingTaps, moe_layer_numbers
from tests.routed_models import (
    as_sets,
    assert_bit_equal,
    forward,
    forward_and_backward,
    loss_of,
    micro_batches,
    policy_model,
    update,
    watched_routers,
)
from tests.tiny_models import dense_config, moe_config

MIXED = moe_config(num_hidden_layers=6, mlp_only_layers=[1], decoder_sparse_step=2)  # MoE layers: the 4th and the 6th


@pytest.fixture(autouse=True)
def _one_rank() -> None:
    parallel.initialize_distributed()
    parallel.initialize_model_parallel(ParallelSection(), seed=1)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_recording_leaves_log_probs_and_gradients_bit_equal(recompute: str):
    untapped, batches = policy_model(recompute=recompute), micro_batches()
    tapped = policy_model(recompute=recompute)
    with RoutingTaps([tapped]).record(batches, margins=True):
        recorded = forward_and_backward(tapped, batches)
    assert_bit_equal(recorded, forward_and_backward(untapped, batches))


def test_outside_a_session_the_model_is_as_if_never_tapped():
    policy, batches = policy_model(), micro_batches()
    taps = RoutingTaps([policy])

    def traces() -> list[Any]:
        routers = [layer.mlp.router.router_replay for layer in policy.decoder.layers]
        return routers + [module._forward_pre_hooks for module in policy.modules() if module._forward_pre_hooks]

    assert not any(traces())
    with taps.record(batches):
        assert all(layer.mlp.router.router_replay is not None for layer in policy.decoder.layers)
        forward_and_backward(policy, batches)
    assert not any(traces())


def test_dense_layers_do_not_shift_the_numbers_of_moe_layers():
    policy, batches = policy_model(MIXED), micro_batches()
    taps = RoutingTaps([policy])
    assert taps.layout.moe_layers == taps.layout.rank_layers == (4, 6)
    with taps.record(batches) as session, watched_routers(policy) as calls:
        forward(policy, batches)
    assert [number for number, _ in calls] == [4, 6] * len(batches)
    for index, (number, experts) in enumerate(calls):
        recorded = session.natural_routes[index // 2].experts[:, [4, 6].index(number)]
        assert torch.equal(as_sets(recorded), experts)


def test_every_second_layer_has_experts_where_the_pattern_is_a_period():
    config = policy_model().config
    config.moe_layer_freq = 3  # Megatron: layers 0, 3, 6, ... counted from 0
    config.num_layers = 8
    assert moe_layer_numbers(config) == (1, 4, 7)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_every_micro_batch_gets_its_own_routes_when_passes_interleave(recompute: str):
    """One-forward-one-backward: micro-batch 0 goes backward after micro-batch 1 went forward."""
    policy, batches = policy_model(recompute=recompute), micro_batches()
    taps = RoutingTaps([policy])
    with taps.record(batches) as session:
        forward(policy, batches)
    update([policy])
    with taps.replay(session.natural_routes, batches), watched_routers(policy) as calls:
        first, second = loss_of(policy(batches[0])), loss_of(policy(batches[1]))
        first.backward()
        third = loss_of(policy(batches[2]))
        second.backward()
        third.backward()
    layers = [layer.layer_number for layer in policy.decoder.layers]
    went_forward = {position: [(position, number) for number in layers] for position in range(3)}
    recomputed = {position: entries[::-1] if recompute == "full" else [] for position, entries in went_forward.items()}
    order = went_forward[0] + went_forward[1] + recomputed[0] + went_forward[2] + recomputed[1] + recomputed[2]
    assert len(calls) == len(order)
    for (number, experts), (position, expected_number) in zip(calls, order, strict=True):
        assert number == expected_number
        assert torch.equal(experts, as_sets(session.natural_routes[position].experts[:, number - 1]))


def test_a_second_or_rebuilt_model_leaves_the_first_ones_taps_at_work():
    batches = micro_batches()
    first = policy_model()
    taps = RoutingTaps([first])
    second = policy_model(seed=6)
    second_taps = RoutingTaps([second])
    with taps.record(batches) as session, watched_routers(first) as calls:
        forward(second, batches)  # its routers ask nobody
        forward(first, batches)
    with second_taps.record(batches) as second_session:
        forward(second, batches)
    recorded = torch.cat([routes.experts.transpose(0, 1) for routes in session.natural_routes], dim=1)
    for number, layer_calls in ((number, [e for n, e in calls if n == number]) for number in (1, 2, 3, 4)):
        assert torch.equal(as_sets(recorded[number - 1]), torch.cat(layer_calls))
    assert not torch.equal(second_session.natural_routes[0].experts, session.natural_routes[0].experts)
    assert RouterReplay.global_router_replay_instances == []  # where Megatron's own would have left orphans


def test_routers_orphaned_by_a_rebuilt_decoder_are_noticed():
    policy, batches = policy_model(), micro_batches()
    taps = RoutingTaps([policy])
    policy.decoder = policy_model(seed=6).decoder
    with (
        pytest.raises(RoutingReplayError, match="layer 1, micro-batch 0: the router asked never, once was expected"),
        taps.record(batches),
    ):
        forward(policy, batches)


def test_a_reference_pass_during_replay_is_not_replayed():
    policy, reference, batches = policy_model(), policy_model(seed=6), micro_batches()
    expected = forward(reference, batches)
    with RoutingTaps([policy]).record(batches) as session:
        forward(policy, batches)
    with RoutingTaps([policy]).replay(session.natural_routes, batches):
        forward(policy, batches)
        assert all(map(torch.equal, forward(reference, batches), expected))


def test_a_micro_batch_that_is_not_in_the_session_is_refused():
    policy, batches = policy_model(), micro_batches()
    with (
        pytest.raises(RoutingReplayError, match="none of those being recorded or replayed"),
        RoutingTaps([policy]).record(batches[:2]),
    ):
        policy(batches[2])


def test_a_micro_batch_may_not_be_listed_twice():
    batches = micro_batches()
    with (
        pytest.raises(RoutingReplayError, match="in the list twice"),
        RoutingTaps([policy_model()]).record([batches[0], batches[0]]),
    ):
        pass


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_surplus_pass_is_refused_naming_layer_and_micro_batch(recompute: str):
    policy, batches = policy_model(MIXED, recompute=recompute), micro_batches()
    with (
        pytest.raises(RoutingReplayError, match="layer 4, micro-batch 1: it passes through the layer a second time"),
        RoutingTaps([policy]).record(batches),
    ):
        forward_and_backward(policy, [batches[1], batches[1]])


def backward_twice(loss: torch.Tensor) -> None:
    loss.backward(retain_graph=True)
    loss.backward()


def test_a_surplus_recomputation_is_refused():
    policy, batches = policy_model(recompute="full"), micro_batches()
    with (
        pytest.raises(RoutingReplayError, match="layer 4, micro-batch 0: the router asks 3 times; twice was expected"),
        RoutingTaps([policy]).record(batches),
    ):
        backward_twice(loss_of(policy(batches[0])))


def test_an_unconsumed_micro_batch_is_an_error_on_leaving():
    policy, batches = policy_model(MIXED), micro_batches()
    taps = RoutingTaps([policy])
    with taps.record(batches) as session:
        forward(policy, batches)
    with (
        pytest.raises(RoutingReplayError, match=r"layer 4, micro-batch 2: .* never, once was expected; .* 2 of 6"),
        taps.replay(session.natural_routes, batches),
    ):
        forward(policy, batches[:2])


def test_a_backward_pass_that_would_recompute_outside_the_session_is_an_error():
    policy, batches = policy_model(recompute="full"), micro_batches()
    with (
        pytest.raises(RoutingReplayError, match="layer 1, micro-batch 0: the router asked once, twice was expected"),
        RoutingTaps([policy]).record(batches),
    ):
        _ = [policy(batch) for batch in batches]


def test_full_recomputation_is_expected_only_where_there_is_a_backward_pass():
    policy, batches = policy_model(recompute="full"), micro_batches()
    taps = RoutingTaps([policy])
    with taps.record(batches):
        forward(policy, batches)
    policy.eval()  # Megatron recomputes nothing in evaluation mode
    with taps.record(batches):
        for batch in batches:
            policy(batch)


@pytest.mark.parametrize("second_taps", [False, True], ids=["the same taps", "other taps of the model"])
def test_a_session_inside_a_session_is_refused_and_the_outer_one_goes_on(second_taps: bool):
    policy, batches = policy_model(), micro_batches()
    taps = RoutingTaps([policy])
    inner = RoutingTaps([policy]) if second_taps else taps
    with taps.record(batches) as session:
        with pytest.raises(RoutingReplayError, match="already"), inner.record(batches):
            pass
        forward(policy, batches)
    assert len(session.natural_routes) == len(batches)


def test_an_exception_inside_a_session_comes_out_as_it_is_and_ends_it():
    policy, batches = policy_model(), micro_batches()
    taps = RoutingTaps([policy])
    with ExitStack() as stack:
        stack.enter_context(pytest.raises(ZeroDivisionError))
        session = stack.enter_context(taps.record(batches))
        policy(batches[0])
        raise ZeroDivisionError
    with pytest.raises(RoutingReplayError, match="it is not, or it failed"):
        _ = session.natural_routes
    with taps.record(batches):
        forward_and_backward(policy, batches)


def test_routes_cannot_be_read_before_the_pass_is_over():
    policy, batches = policy_model(), micro_batches()
    with RoutingTaps([policy]).record(batches) as session:
        forward_and_backward(policy, batches)
        with pytest.raises(RoutingReplayError, match="when the pass that chooses them is over"):
            _ = session.natural_routes


@pytest.mark.parametrize(
    "settings",
    [
        {"moe_router_fusion": True},
        {"moe_enable_routing_replay": True},
        {"moe_router_load_balancing_type": "sinkhorn"},
        {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
        {"recompute_granularity": "full", "recompute_method": "block"},
        {"overlap_moe_expert_parallel_comm": True},
        {"cuda_graph_impl": "local"},
    ],
    ids=lambda settings: next(reversed(settings)),
)
def test_settings_under_which_routers_do_not_ask_are_refused(settings: dict[str, Any]):
    policy = policy_model()
    for name, value in settings.items():
        setattr(policy.config, name, value)
    with pytest.raises(RoutingReplayError, match=next(reversed(settings))):
        RoutingTaps([policy])


def test_a_dense_model_has_nothing_to_tap():
    with pytest.raises(RoutingReplayError, match="dense"):
        RoutingTaps([policy_model(dense_config())])
