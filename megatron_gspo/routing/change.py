"""Change between two policies' routes (§5.3): which of a token's experts under the old policy the new one replaced.

In: the experts that each token activates under two policies, [T, L, K]. Out: how many were replaced, per token and MoE
layer. With E_old and E_new the sets of K experts of a token in a layer,

    c = 1 - |E_old ∩ E_new| / K,

whose mean over tokens and layers is the paper's "roughly 10% of the experts". The order of the K experts means nothing.

Shape legend: T tokens that count (no padding, none without a route), L MoE layers on this rank, K experts a token
activates, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

MAX_EXPERTS = 2**15  # of a layer; expert numbers are compared as uint8 or int16


def check_routes(
    experts: torch.Tensor, num_experts: int, *, layers: Sequence[int] | None = None, name: str = "routes"
) -> None:
    """Return when `experts` are routes: [T, L, K] integers in [0, num_experts), the K of a token and layer distinct.

    Costs about half of comparing two sets of routes, and one wait for the device.

    Args:
        layers: number of each of the L layers in the model, for the message; default 0, 1, ...
        name: what the routes are called in the message.

    Raises:
        ValueError: they are not; naming the first token and MoE layer.
    """
    if experts.ndim != 3 or experts.dtype.is_floating_point or experts.dtype == torch.bool:
        raise ValueError(f"{name}: expected integers [tokens, layers, experts], got {experts.dtype} {_shape(experts)}")
    num_layers, top_k = experts.shape[1:]
    layer_numbers = range(num_layers) if layers is None else layers
    if len(layer_numbers) != num_layers:
        raise ValueError(
            f"{name}: {num_layers} MoE layers in {_shape(experts)}, but {len(layer_numbers)} layer numbers"
        )
    if not 1 <= top_k <= num_experts <= MAX_EXPERTS:
        raise ValueError(
            f"{name}: {top_k} of {num_experts} experts a token; accepted: 1 to all of at most {MAX_EXPERTS}"
        )
    if experts.numel() == 0:
        return
    # uint16 has neither minimum nor order in PyTorch.
    ordered = experts.to(torch.int32) if experts.dtype == torch.uint16 else experts
    lowest, highest = torch.aminmax(ordered)
    duplicated = _duplicated(ordered)
    problems = torch.stack([lowest < 0, highest >= num_experts, duplicated.any()])
    too_low, too_high, has_duplicates = problems.tolist()
    if too_low or too_high:
        outside = (ordered < 0) | (ordered >= num_experts)
        token, layer, k = outside.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: token {token} in MoE layer {layer_numbers[layer]} is sent to expert {int(ordered[token, layer, k])}; "
            f"the layer has experts 0 to {num_experts - 1}"
        )
    if has_duplicates:
        token, layer = duplicated.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: token {token} in MoE layer {layer_numbers[layer]} is sent to an expert twice: "
            f"{ordered[token, layer].tolist()}"
        )


def kept_experts(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Which of the `old` experts [T, L, K] are also among the `new` ones: [K, T, L] bool, in the order of `old`.

    Both are valid routes (`check_routes`), in any integer dtypes. K sits in front so that each of the K steps compares
    K·T·L numbers in one contiguous vector operation; packing the sets into bit masks measured no faster, on a CPU, than
    comparing all K × K pairs, and this 7 times as fast.

    Raises:
        ValueError: the shapes differ, or both are one buffer.
    """
    if old.shape != new.shape or old.ndim != 3:
        raise ValueError(
            f"routes to compare must both be [tokens, layers, experts]: the old are {_shape(old)}, the new {_shape(new)}"
        )
    if old.numel() > 0 and old.data_ptr() == new.data_ptr():
        raise ValueError("the old and the new routes are one buffer: compared with itself, nothing ever changes")
    # Half the bytes or less, and an equality that uint16 lacks.
    dtype = torch.uint8 if old.dtype == new.dtype == torch.uint8 else torch.int16
    old_first, new_first = experts_first(old, dtype), experts_first(new, dtype)
    kept = torch.zeros_like(old_first, dtype=torch.bool)
    for expert in new_first:  # [T, L]
        kept |= old_first == expert
    return kept


def experts_first(experts: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The routes `experts` [T, L, K] laid out [K, T, L], contiguous; default dtype uint8 if they are, else int16."""
    if dtype is None:
        dtype = torch.uint8 if experts.dtype == torch.uint8 else torch.int16
    return experts.to(dtype).permute(2, 0, 1).contiguous()


def count_replaced(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """How many of its K experts each token lost in each layer: [T, L] int32, from 0 to K; K·c.

    Takes and raises what `kept_experts` does.
    """
    return (~kept_experts(old, new)).sum(0, dtype=torch.int32)


def change_rate(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """c of every token in every layer: [T, L] float32 in [0, 1]. Takes and raises what `kept_experts` does."""
    return count_replaced(old, new) / old.shape[-1]


def response_positions(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """How far into its response each token is: [T] float32, from 0 to below 1. `cu_seqlens` [N + 1] runs from 0 to T."""
    lengths = cu_seqlens.diff().long()
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), lengths)
    index = torch.arange(len(starts), device=cu_seqlens.device) - starts
    return index / torch.repeat_interleave(lengths, lengths)


def _duplicated(experts: torch.Tensor) -> torch.Tensor:
    """[T, L] bool: whether any two of the K experts are the same."""
    # Every pair is at a distance of at most K // 2 around the circle.
    circle = experts.permute(2, 0, 1).repeat(2, 1, 1)
    top_k = experts.shape[-1]
    duplicated = torch.zeros_like(circle[:top_k], dtype=torch.bool)
    for distance in range(1, top_k // 2 + 1):
        duplicated |= circle[:top_k] == circle[distance : distance + top_k]
    return duplicated.any(0)


def _shape(tensor: torch.Tensor) -> list[int]:
    return list(tensor.shape)
