"""The pool that the distributed tests rely on: it must answer by rank, and never swallow a failure."""

import pytest

from tests.distributed.rank_pool import RankError, RankPool

HERE = "tests.distributed.rank_pool_tasks"


def test_results_come_by_rank_and_failures_come_with_their_traceback(ranks: RankPool):
    assert ranks.run(f"{HERE}:own_rank_and_sum", num_ranks=2, value=3) == [[0, 6], [1, 6]]
    with pytest.raises(RankError, match=r"(?s)rank 1 failed.*ValueError: rank 1 raises this"):
        ranks.run(f"{HERE}:raise_on_rank", num_ranks=2, guilty=1)
    with pytest.raises(RankError, match=r"(?s)rank 0 did not end within 2 s.*in sleep_on_rank"):
        ranks.run(f"{HERE}:sleep_on_rank", num_ranks=1, guilty=0, timeout_s=2)
    assert ranks.run(f"{HERE}:own_rank_and_sum", num_ranks=1, value=5) == [[0, 5]]
