"""Megatron's collectives for its distributed optimizer, in a group of one rank: nothing is copied to where it is."""

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer as buffers

from megatron_gspo import parallel

COLLECTIVES = ["dist_reduce_scatter_func", "dist_all_gather_func"]


@pytest.fixture(autouse=True)
def _one_rank() -> None:
    parallel.initialize_distributed()


@pytest.mark.parametrize("name", COLLECTIVES)
def test_only_what_is_already_in_place_is_left_alone(name: str):
    def asked_of_gloo(output: torch.Tensor) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            getattr(buffers, name)(output, here, group=dist.group.WORLD, async_op=False)
        return sum(event.key.startswith("c10d::") for event in profile.key_averages())

    here, elsewhere = torch.arange(6.0), torch.zeros(6)
    assert asked_of_gloo(here) == 0
    assert here.tolist() == [0, 1, 2, 3, 4, 5]
    assert asked_of_gloo(elsewhere) == 1
    assert torch.equal(elsewhere, here)


@pytest.mark.parametrize("name", COLLECTIVES)
def test_who_waits_for_a_handle_gets_one(name: str):
    here = torch.arange(6.0)
    getattr(buffers, name)(here, here, group=dist.group.WORLD, async_op=True).wait()
    assert here.tolist() == [0, 1, 2, 3, 4, 5]
