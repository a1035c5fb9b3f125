"""What a response near the length limit loses, against DAPO's equation 13."""

import numpy as np
import pytest

from megatron_gspo.reward import overlong_penalties


@pytest.mark.parametrize(("length", "penalty"), [(1, 0), (16, 0), (17, -0.25), (18, -0.5), (19, -0.75), (20, -1)])
def test_the_penalty_rises_linearly_over_the_buffer(length: int, penalty: float):
    assert overlong_penalties([length], max_tokens=20, buffer_tokens=4) == [penalty]


def test_a_buffer_as_long_as_the_limit_costs_every_token():
    np.testing.assert_allclose(overlong_penalties([1, 5, 10], max_tokens=10, buffer_tokens=10), [-0.1, -0.5, -1.0])
