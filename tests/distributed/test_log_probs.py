"""Log-probs over a vocabulary divided among ranks, held against one rank that has all of it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gspo.model.log_probs import token_log_probs
from tests.distributed.rank_pool import RankPool

HIDDEN_SIZE, ROWS_A_RANK, NUM_TOKENS = 12, 20, 17


def inputs(num_rows: int, vocabulary_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, output layer, targets and the gradients that come back, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_TOKENS, HIDDEN_SIZE, generator=generator)
    weight = torch.randn(num_rows, HIDDEN_SIZE, generator=generator)
    targets = torch.randint(vocabulary_size, (NUM_TOKENS,), generator=generator)
    incoming = torch.randn(2, NUM_TOKENS, generator=generator)
    incoming[:, 4:7] = 0  # a clipped response
    return hidden.requires_grad_(), weight, targets, incoming


def on_shard(vocabulary_size: int) -> None:
    """One rank's part; its results must be the rows of the whole that it owns, and the whole log-probs."""
    rank = dist.get_rank()
    hidden, weight, targets, incoming = inputs(ROWS_A_RANK * dist.get_world_size(), vocabulary_size)
    own_rows = slice(ROWS_A_RANK * rank, ROWS_A_RANK * (rank + 1))
    shard = weight[own_rows].clone().requires_grad_()
    options = {"temperature": 0.7, "chunk_tokens": 5, "vocabulary_size": vocabulary_size}
    sharded = token_log_probs(hidden, shard, targets, tensor_parallel_group=dist.group.WORLD, **options)
    grad_hidden, grad_shard = torch.autograd.grad(sharded, (hidden, shard), tuple(incoming))
    dist.all_reduce(grad_hidden)  # what the layer before the output layer does

    weight.requires_grad_()
    whole = token_log_probs(hidden, weight, targets, **options)
    expected_hidden, expected_weight = torch.autograd.grad(whole, (hidden, weight), tuple(incoming))
    torch.testing.assert_close(sharded, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_hidden, expected_hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_shard, expected_weight[own_rows], rtol=1e-5, atol=1e-5)

    empty = token_log_probs(hidden[:0], shard, targets[:0], tensor_parallel_group=dist.group.WORLD)
    assert empty[0].shape == (0,)


@pytest.mark.parametrize(
    "vocabulary_size",
    [
        pytest.param(40, id="every row a token"),
        pytest.param(33, id="padding on the last rank"),
        pytest.param(15, id="last rank all padding"),
    ],
)
def test_split_vocabulary_equals_whole_in_value_and_gradient(vocabulary_size: int, ranks: RankPool) -> None:
    ranks.run("tests.distributed.test_log_probs:on_shard", num_ranks=2, vocabulary_size=vocabulary_size)
