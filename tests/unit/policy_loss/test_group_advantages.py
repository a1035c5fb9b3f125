"""Group advantages (eq. 7)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_gspo.policy_loss import group_advantages, policy_loss, token_advantages

REWARDS = st.floats(-1e6, 1e6, width=32)


def test_advantages_are_eq_7_with_the_populations_standard_deviation():
    # mean 0.25, deviations (0.75, -0.25, -0.25, -0.25), mean square 0.1875
    expected = np.array([0.75, -0.25, -0.25, -0.25]) / np.sqrt(0.1875)
    np.testing.assert_allclose(group_advantages([1.0, 0.0, 0.0, 0.0]), expected, rtol=1e-6)


def test_without_normalization_advantages_are_centred_rewards():
    np.testing.assert_allclose(group_advantages([1.0, 0.0, 0.0, 0.0], "none"), [0.75, -0.25, -0.25, -0.25])


@given(reward=REWARDS, size=st.integers(2, 64), normalization=st.sampled_from(["std", "none"]))
def test_a_group_of_equal_rewards_gets_exactly_zero(reward, size, normalization):
    assert (group_advantages([reward] * size, normalization) == 0).all()


@pytest.mark.parametrize("size", [3, 6, 7, 10])
def test_equal_rewards_whose_mean_rounds_get_exactly_zero(size):
    """Ten times 0.1 averages to 0.09999999999999999; the remainder over its own deviation would be 1."""
    assert (group_advantages(np.full(size, 0.1)) == 0).all()
    assert (group_advantages([0.1 + 0.2, *[0.3] * (size - 1)]) == 0).all()


@given(st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0]), min_size=2, max_size=32))
def test_advantages_of_unequal_rewards_have_mean_zero_and_mean_square_one(rewards):
    advantages = group_advantages(rewards).astype(np.float64)
    if len(set(rewards)) > 1:
        assert advantages.mean() == pytest.approx(0, abs=1e-6)
        assert np.square(advantages).mean() == pytest.approx(1, rel=1e-5)
    else:
        assert (advantages == 0).all()


@given(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=2, max_size=16), st.floats(0.1, 10.0), st.floats(-5, 5))
def test_scaling_and_shifting_all_rewards_changes_nothing(rewards, scale, shift):
    np.testing.assert_allclose(
        group_advantages(np.array(rewards) * scale + shift), group_advantages(rewards), rtol=1e-3, atol=1e-3
    )


def test_several_groups_at_once_are_each_relative_to_themselves():
    rewards = np.array([[1.0, 0.0], [5.0, 5.0], [0.0, 10.0]])
    np.testing.assert_array_equal(group_advantages(rewards), [[1, -1], [0, 0], [-1, 1]])
    assert group_advantages(rewards).dtype == np.float32


def test_a_reward_that_is_not_finite_is_refused():
    with pytest.raises(AssertionError, match="not finite"):
        group_advantages([1.0, float("nan")])


@pytest.mark.parametrize("normalization", ["std", "none"])
def test_a_token_answers_for_the_rewards_from_its_own_on(normalization):
    rewards = [1.5, 0.0, 1.0]  # totals; a final 1 and 0.5 on the way, -1 on the way and a final 1, a final 1
    on_the_way = [np.array([0, 0.5, 0, 0]), np.array([0, -1.0, 0]), np.array([0.0])]
    mean = sum(rewards) / 3
    scale = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / 3) if normalization == "std" else 1.0
    expected = [[1.5, 1.5, 1.0, 1.0], [0.0, 0.0, 1.0], [1.0]]
    found = token_advantages(rewards, on_the_way, normalization)
    for own, by_hand in zip(found, expected, strict=True):
        np.testing.assert_allclose(own, [(to_go - mean) / scale for to_go in by_hand], rtol=1e-6)
        assert own.dtype == np.float32


@given(
    rewards=st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=8), normalization=st.sampled_from(["std", "none"])
)
def test_without_rewards_on_the_way_each_token_has_its_responses_advantage(rewards, normalization):
    nothing = [np.zeros(3, dtype=np.float32) for _ in rewards]
    for own, whole in zip(
        token_advantages(rewards, nothing, normalization), group_advantages(rewards, normalization), strict=True
    ):
        assert own.tolist() == [whole] * 3


def test_equal_totals_teach_nothing_under_std():
    on_the_way = [np.array([0.5, 0.0]), np.array([0.0, 0.5])]
    assert [own.tolist() for own in token_advantages([0.5, 0.5], on_the_way)] == [[0, 0], [0, 0]]


def test_gspo_token_with_turns_of_their_own_advantage_weights_each_turn_by_it():
    # Two turns of two and one tokens; the ratio stays one a response (eq. 15).
    log_probs = torch.tensor([-1.0, -2.0, -0.5, -1.0], dtype=torch.float64, requires_grad=True)
    advantages = np.concatenate(token_advantages([1.5, 0.0], [np.array([0, 0.5, 0]), np.zeros(1)]))
    bounds = torch.tensor([0, 3, 4])
    policy_loss("gspo_token", log_probs, log_probs.detach(), torch.from_numpy(advantages), bounds).loss.backward()
    # totals 1.5 and 0 have mean 0.75 and deviation 0.75: the first turn's advantage is 1, the second's 1/3
    assert log_probs.grad.tolist() == pytest.approx([-1 / 6, -1 / 6, -1 / 18, 1 / 2], rel=1e-6)
