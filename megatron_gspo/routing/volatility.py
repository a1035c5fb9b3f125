"""Expert volatility (§5.3): everything that is counted about routes changing, in every MoE layer.

In: the routes of the same tokens under two policies, where in its response each token is, and, if known, the old
policy's router margins. Out: `RoutingChange`, whole-number counts that add up over micro-batches and ranks and lose
nothing in doing so; `volatility_metrics` turns them into what is reported. Two measurements of one policy go through the
same functions: that is the noise floor, or the engine's disagreement with the trainer.

A token changes "in any layer" across pipeline stages, so that is counted apart: each rank sums `count_replaced` over its
layers, [T], the sums of the stages are added, and `count_rerouted_tokens` takes the total.

Shape legend: T tokens that count (no padding, none without a route), L MoE layers on this rank, K experts a token
activates, E experts of a layer, P bins of the position in the response, M bins of the router margin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_gspo.routing.additive import Additive
from megatron_gspo.routing.change import experts_first, kept_experts
from megatron_gspo.routing.margin import NUM_MARGIN_BINS, margin_bins

NUM_POSITION_BINS = 16


@dataclass(frozen=True, eq=False)
class RoutingChange(Additive):
    """Counts over tokens, for each of L MoE layers. All tensors are int64."""

    layers: tuple[int, ...]  # [L] number of each layer among the model's MoE layers
    top_k: int  # K
    tokens: torch.Tensor  # [L, P, K + 1] tokens, by position in the response and number of experts replaced
    margin_tokens: torch.Tensor  # [L, M, 2] tokens whose margin is known, by margin, and by whether any expert changed
    load_old: torch.Tensor  # [L, E] tokens each expert got under the old policy
    load_new: torch.Tensor  # [L, E] and under the new one
    lost: torch.Tensor  # [L, E] tokens that were the expert's under the old policy and are not under the new one

    @classmethod
    def zeros(
        cls,
        layers: Sequence[int],
        num_experts: int,
        top_k: int,
        *,
        num_position_bins: int = NUM_POSITION_BINS,
        device: torch.device | str = "cpu",
    ) -> RoutingChange:
        """Nothing counted yet."""

        def counts(*shape: int) -> torch.Tensor:
            return torch.zeros(len(layers), *shape, dtype=torch.int64, device=device)

        return cls(
            layers=tuple(layers),
            top_k=top_k,
            tokens=counts(num_position_bins, top_k + 1),
            margin_tokens=counts(NUM_MARGIN_BINS, 2),
            load_old=counts(num_experts),
            load_new=counts(num_experts),
            lost=counts(num_experts),
        )

    @property
    def gained(self) -> torch.Tensor:
        """[L, E] tokens that are the expert's under the new policy and were not under the old one."""
        return self.lost + self.load_new - self.load_old

    @property
    def num_tokens(self) -> torch.Tensor:
        """[L] tokens compared."""
        return self.tokens.sum((1, 2))

    def on_layers(self, layers: Sequence[int]) -> RoutingChange:
        """The same counts, with zeros for those of `layers` held elsewhere: pipeline stages then add up.

        `layers` are all MoE layers of the model, in order; every layer counted here is among them.
        """
        rows = torch.tensor([layers.index(layer) for layer in self.layers], dtype=torch.int64)

        def spread(counts: torch.Tensor) -> torch.Tensor:
            return counts.new_zeros(len(layers), *counts.shape[1:]).index_copy(0, rows.to(counts.device), counts)

        return RoutingChange(
            layers=tuple(layers),
            top_k=self.top_k,
            tokens=spread(self.tokens),
            margin_tokens=spread(self.margin_tokens),
            load_old=spread(self.load_old),
            load_new=spread(self.load_new),
            lost=spread(self.lost),
        )


@dataclass(frozen=True, eq=False)
class ReroutedTokens(Additive):
    """How many tokens have another set of experts in at least one MoE layer of the whole model. 0-d int64."""

    num_tokens: torch.Tensor
    num_rerouted: torch.Tensor


def count_change(
    old: torch.Tensor,
    new: torch.Tensor,
    *,
    num_experts: int,
    layers: Sequence[int],
    positions: torch.Tensor,
    num_position_bins: int = NUM_POSITION_BINS,
    old_margin: torch.Tensor | None = None,
) -> RoutingChange:
    """Count how the routes `old` [T, L, K] became `new` [T, L, K]; both are valid (`change.check_routes`).

    Args:
        layers: [L] number of each layer among the model's MoE layers.
        positions: [T] how far into its response each token is, float in [0, 1) (`change.response_positions`); or the
            position's bin, integer in [0, num_position_bins).
        old_margin: [T, L] float, the old policy's K-th largest router score minus its K+1-th; None where it is unknown,
            or where K = E and no set can change.

    Raises:
        ValueError: shapes differ, both routes are one buffer, or a position or margin is out of its range.
    """
    num_tokens, num_layers, top_k = old.shape
    if len(layers) != num_layers:
        raise ValueError(f"the routes have {num_layers} MoE layers, but {len(layers)} layer numbers were given")
    if positions.shape != (num_tokens,):
        raise ValueError(f"{num_tokens} tokens have routes, but the positions are of shape {list(positions.shape)}")
    kept = kept_experts(old, new)  # [K, T, L]
    replaced = (~kept).sum(0, dtype=torch.int32)
    bins = _position_bins(positions, num_position_bins)[:, None].expand(-1, num_layers)
    old_load = _count(experts_first(old), num_experts, kept, 2)  # [L, E, lost or kept]
    new_load = _count(experts_first(new), num_experts)
    return RoutingChange(
        layers=tuple(layers),
        top_k=top_k,
        tokens=_count(bins, num_position_bins, replaced, top_k + 1),
        margin_tokens=_count_margins(old_margin, replaced),
        load_old=old_load.sum(-1),
        load_new=new_load,
        lost=old_load[..., 0],
    )


def count_rerouted_tokens(num_changes: torch.Tensor) -> ReroutedTokens:
    """Count tokens whose experts changed in at least one layer of the model.

    `num_changes` [T] integer: experts replaced (or layers changed), summed over ALL MoE layers of the model.
    """
    assert num_changes.ndim == 1, "one number a token: sum over layers, and over pipeline stages, first"
    return ReroutedTokens(
        num_tokens=torch.tensor(len(num_changes), dtype=torch.int64, device=num_changes.device),
        num_rerouted=num_changes.count_nonzero(),
    )


def _count_margins(margin: torch.Tensor | None, replaced: torch.Tensor) -> torch.Tensor:
    if margin is None:
        return torch.zeros(replaced.shape[1], NUM_MARGIN_BINS, 2, dtype=torch.int64, device=replaced.device)
    if margin.shape != replaced.shape:
        raise ValueError(f"the margins must be [tokens, layers] {list(replaced.shape)}; they are {list(margin.shape)}")
    return _count(margin_bins(margin), NUM_MARGIN_BINS, replaced > 0, 2)


def _position_bins(positions: torch.Tensor, num_bins: int) -> torch.Tensor:
    """[T] int32 in [0, num_bins)."""
    end = 1 if positions.dtype.is_floating_point else num_bins
    if positions.numel() > 0 and not bool(((positions >= 0) & (positions < end)).all()):
        raise ValueError(
            f"a position in the response is outside [0, {end}): they range from {float(positions.min())} "
            f"to {float(positions.max())}"
        )
    if positions.dtype.is_floating_point:
        # A position just below 1 can round up to the end where num_bins is no power of two.
        positions = (positions * num_bins).clamp(max=num_bins - 1)
    return positions.to(torch.int32)


def _count(
    first: torch.Tensor, num_first: int, second: torch.Tensor | None = None, num_second: int = 1
) -> torch.Tensor:
    """How often each value of `first`, or pair of values of `first` and `second`, occurs in each layer.

    Both are [..., L], integer or bool, in [0, num_first) and [0, num_second). Returns [L, num_first], or
    [L, num_first, num_second]. One histogram over all layers, of whole numbers and without weights: exact, and
    repeatable on a GPU.
    """
    num_layers = first.shape[-1]
    layer = torch.arange(num_layers, dtype=torch.int32, device=first.device)
    key, shape = layer * num_first + first, [num_layers, num_first]
    if second is not None:
        key, shape = key.mul_(num_second).add_(second), [*shape, num_second]
    return torch.bincount(key.flatten(), minlength=math.prod(shape)).view(shape)
