"""How routes are kept: one byte an expert where that is enough, layer by layer, for this rank's share of the model.

In: which MoE layers and which tokens of a packed micro-batch a rank's routers see (`RoutingLayout`). Out: room for the
experts they chose (`MicroBatchRoutes`), which a later pass over the same micro-batch replays or compares with.

Shape legend: S tokens of a packed micro-batch that this rank's routers see (under context and sequence parallelism a
part of them),
L MoE layers on this rank, K activated experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_gspo.context_parallel import ContextShare
from megatron_gspo.types import MicroBatch

_MOST_EXPERTS_IN_A_BYTE = 256


class RoutingReplayError(RuntimeError):
    """Routes are missing, left over, or do not fit what they are replayed into. Never routed live in silence instead."""


@dataclass(frozen=True)
class RoutingLayout:
    """What routing a model does, and which part of it on this rank. Layers are numbered as Megatron does: from 1, over
    all pipeline stages, dense layers counted."""

    moe_layers: tuple[int, ...]  # every MoE layer of the model; routes of a rollout engine are in this order
    rank_layers: tuple[int, ...]  # those on this rank
    num_experts: int
    top_k: int
    context: ContextShare = field(
        default_factory=ContextShare
    )  # what this context-parallel rank holds of a micro-batch
    token_shard: int = 0  # under sequence parallelism, which of the equal parts of that this rank's routers see
    num_token_shards: int = 1

    def __post_init__(self) -> None:
        assert set(self.rank_layers) <= set(self.moe_layers), "a rank's MoE layers are among the model's"
        assert 0 <= self.token_shard < self.num_token_shards, "shards are counted from 0"

    @property
    def dtype(self) -> torch.dtype:
        """What an expert's number is stored as."""
        return torch.uint8 if self.num_experts <= _MOST_EXPERTS_IN_A_BYTE else torch.uint16

    @property
    def bytes_per_token(self) -> int:
        """What the routes of one token take, over all MoE layers of the model (on whichever ranks)."""
        return len(self.moe_layers) * self.top_k * self.dtype.itemsize

    @property
    def rank_layer_indices(self) -> list[int]:
        """Where this rank's layers are in `moe_layers`."""
        return [self.moe_layers.index(number) for number in self.rank_layers]

    @property
    def num_parts(self) -> int:
        """Ranks that share the tokens of a micro-batch in the same layers."""
        return self.context.size * self.num_token_shards

    def num_tokens_here(self, micro_batch: MicroBatch) -> int:
        """How many of a micro-batch's tokens this rank's routers see."""
        num_tokens = len(micro_batch.token_ids)
        assert num_tokens % self.num_parts == 0, "ranks see equal parts"
        return num_tokens // self.num_parts

    def token_positions(self, micro_batch: MicroBatch) -> Tensor:
        """Which of a micro-batch's tokens those are, in the order the routers see them: [S] int64, on its device."""
        held = self.context.positions(micro_batch.segment_cu_seqlens, len(micro_batch.token_ids))
        length = self.num_tokens_here(micro_batch)
        return held[self.token_shard * length : (self.token_shard + 1) * length]


@dataclass(frozen=True, eq=False)
class MicroBatchRoutes:
    """The experts chosen for one micro-batch, in this rank's layers and for the tokens its routers see.

    Kept layer by layer, so that a router writes and reads one contiguous block.
    """

    by_layer: Tensor  # [L, S, K] uint8 or uint16 (`RoutingLayout.dtype`)
    margins_by_layer: Tensor | None = None  # [L, S] float32, where they were asked for
    has_route: Tensor | None = None  # [S] bool on the host; None where every token has a route

    @classmethod
    def room_for(
        cls, layout: RoutingLayout, micro_batch: MicroBatch, *, on_host: bool, margins: bool
    ) -> MicroBatchRoutes:
        """Room for what the routers choose for a micro-batch, its contents undefined.

        Args:
            on_host: keep it in (pinned) host memory.
            margins: also for the routers' margins.
        """
        shape = (len(layout.rank_layers), layout.num_tokens_here(micro_batch), layout.top_k)
        device = micro_batch.token_ids.device
        place = {"device": "cpu", "pin_memory": device.type == "cuda"} if on_host else {"device": device}
        return cls(
            by_layer=torch.empty(shape, dtype=layout.dtype, **place),
            margins_by_layer=torch.empty(shape[:2], dtype=torch.float32, **place) if margins else None,
        )

    @property
    def experts(self) -> Tensor:
        """[S, L, K] uint8 or uint16, a view."""
        return self.by_layer.transpose(0, 1)

    @property
    def margins(self) -> Tensor | None:
        """K-th largest score minus the K+1-th, [S, L] float32, a view; infinite where a token activates every expert."""
        return None if self.margins_by_layer is None else self.margins_by_layer.transpose(0, 1)

    def store(self, layer: int, experts: Tensor) -> None:
        """Keep `experts` [S, K] of the rank's layer number `layer`, from 0."""
        # Narrowed before it travels to the host.
        self.by_layer[layer].copy_(experts.to(self.by_layer.dtype), non_blocking=True)

    def store_margins(self, layer: int, margins: Tensor) -> None:
        """Keep `margins` [S] of the rank's layer number `layer`, from 0."""
        assert self.margins_by_layer is not None, "room for margins was not asked for"
        self.margins_by_layer[layer].copy_(margins, non_blocking=True)

    def load(self, layer: int, device: torch.device) -> Tensor:
        """The experts of the rank's layer number `layer`, from 0: [S, K] int64 on `device`."""
        # Widened after it has travelled from the host.
        return self.by_layer[layer].to(device, non_blocking=True).long()
