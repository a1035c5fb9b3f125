"""Comparing two policies' routes: answers known by construction, and against Python sets."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_gspo.routing.change import change_rate, check_routes, count_replaced, response_positions
from tests.unit.routing.random_routes import random_routes, replaced_by_sets

STORED_DTYPES = [torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64]


@st.composite
def route_shapes(draw):
    """(T, L, K, E), small, with every edge: no token, no layer, one expert, K = E."""
    num_experts = draw(st.integers(1, 24))
    return draw(st.integers(0, 6)), draw(st.integers(0, 4)), draw(st.integers(1, num_experts)), num_experts


@pytest.mark.parametrize("dtype", STORED_DTYPES)
def test_equal_sets_in_two_buffers_have_change_rate_exactly_zero(dtype):
    old = random_routes(64, 5, 4, 16, seed=0).long()
    new = old.flip(-1)
    assert torch.equal(change_rate(old.to(dtype), new.to(dtype)), torch.zeros(64, 5))


@pytest.mark.parametrize("dtype", STORED_DTYPES)
def test_disjoint_sets_have_change_rate_exactly_one(dtype):
    old = random_routes(64, 5, 4, 8, seed=1).long()
    assert torch.equal(change_rate(old.to(dtype), (old + 8).to(dtype)), torch.ones(64, 5))


def test_change_rate_is_the_share_of_experts_replaced():
    old = torch.tensor([[[0, 1, 2, 3], [4, 5, 6, 7]]], dtype=torch.uint8)
    new = torch.tensor([[[3, 2, 1, 9], [7, 0, 1, 4]]], dtype=torch.uint8)
    assert change_rate(old, new).tolist() == [[0.25, 0.5]]


def test_a_known_difference_between_two_buffers_is_found_and_only_there():
    old = random_routes(32, 6, 2, 8, seed=2)
    new = old.clone()
    new[5, 3] = torch.tensor([expert for expert in range(8) if expert not in old[5, 3].tolist()][:2])
    replaced = count_replaced(old, new)
    assert replaced[5, 3] == 2
    assert replaced.sum() == 2


def test_comparing_a_buffer_with_itself_is_refused():
    """An agreement that is always 1.0 because both sides read the same buffer looks like a healthy run."""
    routes = random_routes(4, 2, 2, 8, seed=3)
    with pytest.raises(ValueError, match="one buffer"):
        count_replaced(routes, routes)


@given(route_shapes(), st.sampled_from(STORED_DTYPES), st.sampled_from(STORED_DTYPES))
def test_replaced_experts_are_those_of_python_sets(shape, old_dtype, new_dtype):
    old, new = random_routes(*shape, seed=4).to(old_dtype), random_routes(*shape, seed=5).to(new_dtype)
    assert torch.equal(count_replaced(old, new), replaced_by_sets(old, new))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int16, torch.int64])
def test_experts_above_255_are_told_apart(dtype):
    old = torch.tensor([[[3, 255, 511]]]).to(dtype)
    new = torch.tensor([[[259, 511, 255]]]).to(dtype)  # 259 - 256 = 3: one byte would wrap onto it
    assert count_replaced(old, new).tolist() == [[1]]


@given(route_shapes(), st.randoms(use_true_random=False))
def test_order_within_the_k_experts_means_nothing(shape, random):
    old, new = random_routes(*shape, seed=6), random_routes(*shape, seed=7)
    order = random.sample(range(shape[2]), shape[2])
    assert torch.equal(count_replaced(old, new), count_replaced(old[..., order], new))
    assert torch.equal(count_replaced(old, new), count_replaced(old, new[..., order]))


@given(route_shapes())
def test_change_is_symmetric(shape):
    old, new = random_routes(*shape, seed=8), random_routes(*shape, seed=9)
    assert torch.equal(change_rate(old, new), change_rate(new, old))


@given(st.integers(1, 24))
def test_nothing_can_change_when_every_expert_is_activated(num_experts):
    old = random_routes(9, 3, num_experts, num_experts, seed=10)
    new = random_routes(9, 3, num_experts, num_experts, seed=11)
    assert count_replaced(old, new).sum() == 0


def test_all_256_experts_kept_are_counted_as_256():
    old = random_routes(2, 1, 256, 512, seed=12, dtype=torch.int16)
    assert torch.equal(count_replaced(old, old.flip(-1)), torch.zeros(2, 1, dtype=torch.int32))
    lowest = torch.arange(256, dtype=torch.int16).reshape(1, 1, 256)
    assert count_replaced(lowest, lowest + 256).tolist() == [[256]]


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"\[4, 2, 2\].*\[4, 3, 2\]"):
        count_replaced(random_routes(4, 2, 2, 8, seed=0), random_routes(4, 3, 2, 8, seed=0))


@given(route_shapes(), st.sampled_from(STORED_DTYPES))
def test_valid_routes_pass_the_check(shape, dtype):
    check_routes(random_routes(*shape, seed=13).to(dtype), num_experts=shape[3])


@pytest.mark.parametrize("dtype", STORED_DTYPES)
@pytest.mark.parametrize("top_k", [2, 3, 7, 8])
def test_an_expert_twice_is_refused_naming_token_and_layer_at_any_two_places(dtype, top_k):
    for first, second in itertools.combinations(range(top_k), 2):
        routes = random_routes(6, 3, top_k, 16, seed=14).long()
        routes[4, 2, first] = routes[4, 2, second]
        with pytest.raises(ValueError, match="recorded: token 4 in MoE layer 21 is sent to an expert twice"):
            check_routes(routes.to(dtype), num_experts=16, layers=(7, 8, 21), name="recorded")


@pytest.mark.parametrize("dtype", STORED_DTYPES)
def test_an_expert_that_the_layer_lacks_is_refused_naming_token_layer_and_expert(dtype):
    routes = random_routes(6, 3, 2, 16, seed=15).long()
    routes[1, 0, 1] = 16
    with pytest.raises(ValueError, match="token 1 in MoE layer 0 is sent to expert 16; the layer has experts 0 to 15"):
        check_routes(routes.to(dtype), num_experts=16)


def test_a_negative_expert_is_refused():
    routes = random_routes(6, 3, 2, 16, seed=16).long()
    routes[5, 1, 0] = -1
    with pytest.raises(ValueError, match="token 5 in MoE layer 1 is sent to expert -1"):
        check_routes(routes, num_experts=16)


@pytest.mark.parametrize(
    ("routes", "num_experts", "layers", "message"),
    [
        (torch.zeros(4, 2, dtype=torch.int64), 8, None, "expected integers"),
        (torch.zeros(4, 2, 1), 8, None, "expected integers"),
        (torch.zeros(4, 2, 1, dtype=torch.int64), 8, (0, 1, 2), "2 MoE layers .* 3 layer numbers"),
        (torch.zeros(4, 2, 9, dtype=torch.int64), 8, None, "9 of 8 experts"),
    ],
)
def test_what_is_no_routes_at_all_is_refused(routes, num_experts, layers, message):
    with pytest.raises(ValueError, match=message):
        check_routes(routes, num_experts, layers=layers)


def test_positions_run_from_zero_to_below_one_in_every_response():
    positions = response_positions(torch.tensor([0, 4, 4, 5, 7]))
    assert positions.tolist() == [0, 0.25, 0.5, 0.75, 0, 0, 0.5]
    assert response_positions(torch.tensor([0])).shape == (0,)
