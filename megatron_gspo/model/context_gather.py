"""What context-parallel ranks computed of a micro-batch's response tokens, put together on all of them.

In: the values of the tokens that are predicted on this rank. Out: those of all tokens, in packing order, with gradient.

A loss over sequences needs all of a sequence's log-probs: GSPO's s_i is a mean over the response's tokens (eq. 7). With
all of them on every rank each computes the same loss of the same T values, and d loss / d value is the same on each. A
rank takes of it what belongs to its own tokens, unscaled: every token's gradient then flows backward on one rank once,
and the sum over ranks, which Megatron's data-parallel wrapper makes, is the gradient of that one loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def tokens_of_all_ranks(values: Tensor, here: Tensor, num_tokens: int, group: dist.ProcessGroup) -> Tensor:
    """Put the ranks' tokens together.

    Args:
        values: [t, …] of the tokens predicted here; t may be 0, and the result hangs on them all the same.
        here: [t] int64, which of all tokens these are; over the ranks of `group` each of them once.
        num_tokens: T, all of them.

    Returns:
        [T, …], the same bits on every rank.
    """
    return _TokensOfAllRanks.apply(values, here, num_tokens, group)


class _TokensOfAllRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, here: Tensor, num_tokens: int, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(here)
        whole = values.new_zeros(num_tokens, *values.shape[1:])
        whole[here] = values
        # A sum with zeros: exact, and a token that is not finite is so on every rank.
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (here,) = ctx.saved_tensors
        return gradient[here], None, None, None
