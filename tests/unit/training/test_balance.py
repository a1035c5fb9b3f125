"""Sharing responses out by their tokens: everyone gets about the same, nothing is lost."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_gspo.training.balance import share_by_tokens

lengths_and_ranks = st.tuples(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 8))


@given(lengths_and_ranks)
def test_the_most_loaded_rank_exceeds_the_mean_by_less_than_one_sample(drawn: tuple[list[int], int]) -> None:
    lengths, num_ranks = drawn
    loads = [0] * num_ranks
    for length, rank in zip(lengths, share_by_tokens(lengths, num_ranks), strict=True):
        loads[rank] += length
    assert max(loads) - sum(lengths) / num_ranks < max(lengths)


@given(lengths_and_ranks)
def test_no_rank_is_idle_while_another_has_two_samples(drawn: tuple[list[int], int]) -> None:
    lengths, num_ranks = drawn
    assert len(set(share_by_tokens(lengths, num_ranks))) == min(len(lengths), num_ranks)


def test_one_very_long_response_is_alone_on_its_rank() -> None:
    assert share_by_tokens([10, 100, 10, 10], num_ranks=2) == [1, 0, 1, 1]
