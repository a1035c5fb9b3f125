"""Tensors on their way into a checkpoint: under storages of their own, in the memory they lie in."""

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_gspo.training.checkpoint_writer import addresses, give_own_storages


def sharded(tensor: torch.Tensor) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets("weight", tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 6), (24,), (1,), (2, 3, 4)])
def test_a_part_of_a_buffer_gets_its_own_storage_without_a_copy(shape: tuple[int, ...], dtype: torch.dtype):
    buffer = torch.arange(40).to(dtype)
    part = buffer[8 : 8 + torch.Size(shape).numel()].view(shape)
    state = {"model": {"weight": sharded(part)}}
    give_own_storages(state)
    own = state["model"]["weight"].data
    assert own.untyped_storage().nbytes() == own.nbytes
    assert own.dtype == dtype
    assert torch.equal(own, part)
    buffer.zero_()  # seen through both: no copy was made
    assert torch.equal(own, part)


def test_a_tensor_that_is_its_whole_storage_stays_as_it_is():
    tensor = torch.ones(3, 4)
    state = {"weight": sharded(tensor)}
    give_own_storages(state)
    assert state["weight"].data.data_ptr() == tensor.data_ptr()


def test_a_part_without_elements_stays_as_it_is():
    part = torch.arange(40)[8:8]
    state = {"weight": sharded(part)}
    give_own_storages(state)
    assert state["weight"].data.shape == (0,)


def test_live_is_what_lies_in_the_runs_own_memory():
    buffer, gathered = torch.zeros(40), torch.zeros(40)
    state = {"weight": sharded(buffer[8:16]), "moment": sharded(gathered[8:16])}
    live = addresses(state, {buffer.untyped_storage().data_ptr()})
    give_own_storages(state)
    assert live == {state["weight"].data.untyped_storage().data_ptr()}
