"""Expert load: the two extremes, whose answers are known, and a case worked out by NumPy."""

import math

import numpy as np
import pytest
import torch

from megatron_gspo.routing.load import dead_experts, load_cv, load_entropy


@pytest.mark.parametrize("num_experts", [1, 2, 128, 512])
def test_a_uniform_load_has_no_spread_full_entropy_and_no_dead_expert(num_experts):
    load = torch.full((3, num_experts), 7)
    torch.testing.assert_close(load_cv(load), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(load_entropy(load), torch.full((3,), math.log(num_experts), dtype=torch.float64))
    assert dead_experts(load).tolist() == [0, 0, 0]


@pytest.mark.parametrize("num_experts", [2, 128])
def test_one_expert_with_all_tokens_has_the_largest_spread_no_entropy_and_all_others_dead(num_experts):
    load = torch.zeros(1, num_experts, dtype=torch.int64)
    load[0, 1] = 1000
    assert float(load_cv(load)) == pytest.approx(math.sqrt(num_experts - 1))
    assert float(load_entropy(load)) == 0
    assert float(dead_experts(load)) == (num_experts - 1) / num_experts


def test_load_statistics_are_numpys():
    load = np.random.default_rng(0).integers(0, 9, size=(4, 12))
    share = load / load.sum(1, keepdims=True)
    entropy = [-sum(p * math.log(p) for p in layer if p > 0) for layer in share]
    np.testing.assert_allclose(load_cv(torch.from_numpy(load)), load.std(1) / load.mean(1))
    np.testing.assert_allclose(load_entropy(torch.from_numpy(load)), entropy)
    np.testing.assert_allclose(dead_experts(torch.from_numpy(load)), (load == 0).mean(1))


def test_a_layer_that_no_token_reached_has_no_load_statistics():
    nothing = torch.zeros(1, 4, dtype=torch.int64)
    assert load_cv(nothing).isnan().all()
    assert load_entropy(nothing).isnan().all()
    assert dead_experts(nothing).isnan().all()
