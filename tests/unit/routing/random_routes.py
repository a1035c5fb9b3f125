"""Random routes, and the slow, obvious way to compare them: Python sets, one token and layer at a time."""

from __future__ import annotations

import torch


def random_routes(
    num_tokens: int, num_layers: int, top_k: int, num_experts: int, seed: int, dtype: torch.dtype = torch.uint8
) -> torch.Tensor:
    """[T, L, K] distinct experts, drawn uniformly."""
    scores = torch.rand(num_tokens, num_layers, num_experts, generator=torch.Generator().manual_seed(seed))
    return scores.topk(top_k).indices.to(dtype)


def lost_by_sets(old: torch.Tensor, new: torch.Tensor) -> list[list[set[int]]]:
    """[T][L] the experts each token had under `old` and has not under `new`."""
    return [
        [set(before) - set(after) for before, after in zip(old_token, new_token, strict=True)]
        for old_token, new_token in zip(old.tolist(), new.tolist(), strict=True)
    ]


def replaced_by_sets(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """[T, L] how many experts each token lost."""
    counts = [[len(lost) for lost in token] for token in lost_by_sets(old, new)]
    return torch.tensor(counts, dtype=torch.int32).reshape(old.shape[:2])
