"""What log-probs and entropies from hidden states are held against: the plain computation, and the products it needs.

Shape legend: T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs [T] of `targets` [T] and entropies [T], float32, from [T, H] and [V, H]; forms all logits."""
    log_p = (hidden @ weight.t()).float().log_softmax(dim=-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(dim=-1)


def products(hidden: Tensor, weight: Tensor) -> Callable[[], None]:
    """Makes the logits twice, and both gradients of them: 8 · T · H · V operations."""
    hidden, weight = hidden.detach(), weight.detach()
    logits, grad_hidden, grad_weight = hidden @ weight.t(), torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        for _ in range(2):
            torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=grad_hidden)
        torch.mm(logits.t(), hidden, out=grad_weight)

    return run
