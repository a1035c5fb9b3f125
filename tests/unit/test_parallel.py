"""A process alone is a run of one rank; wrong sizes and half-told addresses are refused."""

import pytest
import torch
from torch.distributed import ProcessGroup, distributed_c10d

from megatron_gspo import parallel
from megatron_gspo.config import ParallelSection
from megatron_gspo.types import UserError


@pytest.fixture(autouse=True)
def _one_rank() -> None:
    parallel.initialize_distributed()


def test_a_process_alone_leads_all_of_the_data():
    parallel.initialize_model_parallel(ParallelSection(), seed=1)
    assert parallel.is_data_leader() and parallel.is_main_rank() and parallel.is_last_stage()
    assert (parallel.data_rank(), parallel.data_size()) == (0, 1)
    assert parallel.broadcast_from_data_leader({"a": 1}) == {"a": 1}
    assert parallel.gather_objects("b") == ["b"]
    assert parallel.sum_over_data_ranks([0.5, 2.0]) == [0.5, 2.0]
    assert parallel.max_over_data_ranks(7) == 7


def test_the_seed_decides_what_is_drawn():
    drawn = []
    for seed in (1, 1, 2):
        parallel.initialize_model_parallel(ParallelSection(), seed=seed)
        drawn.append(torch.rand(3))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tensor": 2}, r"multiply to 2, which does not divide the number of ranks, 1"),
        ({"expert": 4}, r"expert_tensor, expert and pipeline.* multiply to 4"),
    ],
)
def test_sizes_that_do_not_divide_the_number_of_ranks_are_refused(layout: dict[str, int], message: str):
    with pytest.raises(UserError, match=message):
        parallel.initialize_model_parallel(ParallelSection(**layout), seed=1)


def test_an_arrangement_of_the_same_sizes_stays_and_one_that_is_given_up_leaves_no_group_behind():
    def groups() -> set[ProcessGroup]:
        return set(distributed_c10d._world.pg_map)

    parallel.initialize_model_parallel(ParallelSection(), seed=1)
    arranged = groups()
    assert len(arranged) > 10
    parallel.initialize_model_parallel(ParallelSection(), seed=2)
    assert groups() == arranged
    parallel._give_up_arrangement()
    assert len(groups()) == 1  # that of all ranks


def test_several_ranks_without_an_address_to_meet_at_are_refused(monkeypatch: pytest.MonkeyPatch):
    parallel.shutdown()
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="2 ranks were started but MASTER_ADDR is not set"):
        parallel.initialize_distributed()
