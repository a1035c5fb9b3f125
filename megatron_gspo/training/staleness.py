"""How far behind the policy that learns from it a response was sampled.

In: groups carried from step to step, and the version of the policy that will learn from them; samples. Out: what may still
be used, and the metrics. A token's staleness is the version of the policy at the start of the step that learns from it,
minus the version that sampled it. A step hands over one version, whatever the number of its updates: 0 is on-policy up to
the step's own mini-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from megatron_gspo.training.totals import Totals
from megatron_gspo.types import MicroBatch, OpenGroup


def without_too_stale(groups: Sequence[OpenGroup], version: int, max_staleness: int) -> tuple[list[OpenGroup], int]:
    """The groups without responses whose oldest token would be too stale, and how many those were.

    Args:
        groups: what is carried, complete or not.
        version: of the policy that will learn from them.
        max_staleness: the largest difference of versions allowed.

    Returns:
        The same groups in the same order; a response that is too stale is not begun, so that it is sampled anew.
    """
    fresh, num_too_stale = [], 0
    for group in groups:
        kept = tuple(
            response if response is None or version - int(response.token_versions.min()) <= max_staleness else None
            for response in group.responses
        )
        num_too_stale += sum(old is not new for old, new in zip(group.responses, kept, strict=True))
        fresh.append(replace(group, responses=kept))
    return fresh, num_too_stale


def record_staleness(staleness: np.ndarray, totals: Totals) -> None:
    """Add a response's tokens, [tokens] policy versions, to `rollout/staleness_mean` and `rollout/staleness_max`."""
    totals.add("rollout/staleness_mean", float(staleness.sum()), len(staleness))
    totals.raise_to({"rollout/staleness_max": float(staleness.max())})


def is_current(micro_batch: MicroBatch) -> torch.Tensor:
    """Which response tokens are of responses that the policy sampled, whole, which learns from them: [T] bool.

    Rollout engine and trainer computed these alike, with equal weights. A response that older weights began they did not,
    its last tokens included: the engine ran the older tokens through the new weights once more, and chose other routes
    for them than those that R3 replays.
    """
    if micro_batch.staleness is None:
        return torch.ones_like(micro_batch.target_token_ids, dtype=torch.bool)
    bounds = micro_batch.response_cu_seqlens
    of_first_token = micro_batch.staleness[bounds[:-1]]  # versions only rise along a response
    return (of_first_token == 0).repeat_interleave(bounds.diff())
