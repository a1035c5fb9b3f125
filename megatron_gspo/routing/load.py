"""How evenly a layer's tokens are spread over its experts.

In: tokens of each expert, [L, E]. Out: a number a layer, [L] float64, NaN for a layer that no token reached. With p_e the
share of the layer's activations that are expert e's, out of E experts:

    load CV        std_e(p) / mean_e(p)     0 when all experts get the same, √(E - 1) when one gets all
    entropy        -Σ p_e log p_e           in nats: log E when all get the same, 0 when one gets all
    dead experts   share of the E experts that got no token
"""

from __future__ import annotations

import torch


def load_cv(load: torch.Tensor) -> torch.Tensor:
    """Coefficient of variation (population) of the load [L, E] over experts: [L] float64."""
    share = _share(load)
    return share.std(dim=-1, correction=0) * load.shape[-1]  # the shares' mean is 1 / E


def load_entropy(load: torch.Tensor) -> torch.Tensor:
    """Entropy of the load [L, E] over experts, in nats: [L] float64."""
    return torch.special.entr(_share(load)).sum(-1)


def dead_experts(load: torch.Tensor) -> torch.Tensor:
    """Share of experts without a token in the load [L, E]: [L] float64."""
    # 0 · NaN is NaN: a layer that no token reached says nothing about its experts.
    return (load == 0).double().mean(-1) + 0 * _share(load).sum(-1)


def _share(load: torch.Tensor) -> torch.Tensor:
    """[L, E] float64, summing to 1 over experts; NaN in a layer that no token reached."""
    return load.double() / load.sum(-1, keepdim=True)
