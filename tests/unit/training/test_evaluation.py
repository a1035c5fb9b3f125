"""pass@k against counting subsets by hand."""

from itertools import combinations

import pytest

from megatron_gspo.training.evaluation import evaluated_ks, pass_at_k


@pytest.mark.parametrize("num_samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_k_subsets_with_a_solution(num_samples: int):
    for num_solved in range(num_samples + 1):
        solved = [index < num_solved for index in range(num_samples)]
        for k in range(1, num_samples + 1):
            subsets = list(combinations(solved, k))
            assert pass_at_k(num_samples, num_solved, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_1_is_the_mean_over_samples():
    assert pass_at_k(8, 3, 1) == pytest.approx(3 / 8)


def test_k_runs_over_powers_of_two_up_to_n():
    assert evaluated_ks(1) == [1]
    assert evaluated_ks(6) == [1, 2, 4]
    assert evaluated_ks(32) == [1, 2, 4, 8, 16, 32]
