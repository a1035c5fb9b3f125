"""What is reported and kept of expert volatility.

In: the counts of `volatility`, already added up over micro-batches and ranks. Out: metrics by name, and the arrays of
`volatility/step_*.npz`. Something that measured nothing has no metric: never a 0, never a NaN.

    {change_rate}             c = 1 - |E_old ∩ E_new| / K, mean over tokens and MoE layers (the paper's "about 10%")
    {change_rate}_layer_{l}   the same in MoE layer l
    {tokens_any_change}       share of tokens whose set of experts changed in at least one MoE layer

under the names of the measurement (`ChangeNames`), and, of the routes under the new policy,

    routing/load_cv, routing/entropy (nats), routing/dead_experts     `load`, mean over MoE layers
    routing/margin_auc                                                `margin`, over pairs of tokens in the same layer
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megatron_gspo.routing.load import dead_experts, load_cv, load_entropy
from megatron_gspo.routing.margin import margin_auc, margin_bin_edges
from megatron_gspo.routing.volatility import ReroutedTokens, RoutingChange


@dataclass(frozen=True)
class ChangeNames:
    """The metric names of one comparison of two sets of routes."""

    change_rate: str
    tokens_any_change: str

    def suffixed(self, suffix: str) -> ChangeNames:
        """The names of one part of the comparison."""
        return ChangeNames(self.change_rate + suffix, self.tokens_any_change + suffix)


POLICY_CHANGE = ChangeNames("routing/change_rate", "routing/tokens_any_change")
"""Old policy against new, both routing naturally."""
NOISE_FLOOR = ChangeNames("routing/noise_floor", "routing/noise_floor_tokens_any_change")
"""The same policy measured twice."""
ENGINE_DISAGREEMENT = ChangeNames("routing/engine_disagreement", "routing/engine_disagreement_tokens_any_layer")
"""The rollout engine's routes against the trainer's, equal weights."""
REPLAYED_PATH_CHANGE = ChangeNames("routing/replayed_path_change_rate", "routing/replayed_path_tokens_any_change")
"""Old routes against what the new policy's routers would have chosen while the old routes were replayed below them."""


def change_metrics(
    change: RoutingChange, rerouted: ReroutedTokens | None = None, names: ChangeNames = POLICY_CHANGE
) -> dict[str, float]:
    """Change rates, of the model and of each layer; and the share of tokens with any change where `rerouted` is given."""
    metrics: dict[str, float] = {}
    rates = dict(zip(change.layers, _change_rate(change.tokens).tolist(), strict=True))
    measured = {layer: rate for layer, rate in rates.items() if rate == rate}
    if measured:
        metrics[names.change_rate] = sum(measured.values()) / len(measured)
    metrics |= {f"{names.change_rate}_layer_{layer}": rate for layer, rate in measured.items()}
    if rerouted is not None and int(rerouted.num_tokens) > 0:
        metrics[names.tokens_any_change] = int(rerouted.num_rerouted) / int(rerouted.num_tokens)
    return metrics


def load_metrics(change: RoutingChange) -> dict[str, float]:
    """How evenly the new policy spreads its tokens over the experts."""
    load = change.load_new[change.load_new.sum(-1) > 0]
    if len(load) == 0:
        return {}
    return {
        "routing/load_cv": float(load_cv(load).mean()),
        "routing/entropy": float(load_entropy(load).mean()),
        "routing/dead_experts": float(dead_experts(load).mean()),
    }


def margin_metrics(change: RoutingChange) -> dict[str, float]:
    """Whether a small margin under the old policy foretells a change; nothing unless some tokens changed, some not."""
    auc, num_pairs = margin_auc(change.margin_tokens)
    total = float(num_pairs.sum())
    if total == 0:
        return {}
    return {"routing/margin_auc": float((auc.nan_to_num() * num_pairs).sum()) / total}


def summarize(
    change: RoutingChange, rerouted: ReroutedTokens | None = None, names: ChangeNames = POLICY_CHANGE
) -> dict[str, float]:
    """All metrics of a comparison of two policies: `change_metrics`, `load_metrics` and `margin_metrics`.

    A noise floor or an engine's disagreement has names of its own for the change alone: use `change_metrics` there.
    """
    return change_metrics(change, rerouted, names) | load_metrics(change) | margin_metrics(change)


def to_arrays(change: RoutingChange) -> dict[str, np.ndarray]:
    """What `volatility/step_*.npz` keeps of a comparison. Counts are int64; L, E, K, P, M as in `volatility`.

    layer                     [L] number among the model's MoE layers
    top_k                     [] K
    tokens                    [L, P, K + 1] tokens, by position in the response and number of experts replaced
    load_old, load_new        [L, E] tokens each expert got under the old and the new policy
    lost, gained              [L, E] tokens that left and that joined each expert
    margin_edges              [M - 1] float32, bounds of the margin bins
    margin_tokens             [L, M, 2] tokens by old margin, unchanged and changed; zeros where margins are unknown
    change_rate               [L] float64, c; NaN where there is no token, here and below
    change_rate_by_position   [L, P] float64
    """
    counts = {
        "tokens": change.tokens,
        "load_old": change.load_old,
        "load_new": change.load_new,
        "lost": change.lost,
        "gained": change.gained,
        "margin_edges": margin_bin_edges(),
        "margin_tokens": change.margin_tokens,
        "change_rate": _change_rate(change.tokens),
        "change_rate_by_position": _change_rate(change.tokens[:, :, None]),
    }
    labels = {"layer": np.array(change.layers, dtype=np.int64), "top_k": np.array(change.top_k, dtype=np.int64)}
    return labels | {name: tensor.cpu().numpy() for name, tensor in counts.items()}


def _change_rate(tokens: torch.Tensor) -> torch.Tensor:
    """Mean c of counts [..., bins, K + 1]: [...] float64, NaN where there is no token."""
    by_replaced = tokens.sum(-2)
    num_replaced = torch.arange(by_replaced.shape[-1], device=tokens.device)
    top_k = by_replaced.shape[-1] - 1
    return (by_replaced * num_replaced).sum(-1) / (by_replaced.sum(-1) * top_k).double()
