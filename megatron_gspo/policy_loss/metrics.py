"""Metrics of the policy loss: ratios and what was clipped in, sums and counts that add up across micro-batches out.

A mean is (sum, count) under its own name. What is not a mean is built by `finalize_metrics` from moments:

    ratio/token_log, ratio/token_log_squared           -> ratio/token_log_std
    ratio/sequence_log, ratio/sequence_log_squared     -> ratio/sequence_log_std
    mismatch/token_log, mismatch/sequence_log, and their squares (training/old_policy.py) -> the same
    ratio/weight, ratio/weight_squared                 -> ratio/effective_sample_fraction

The clip fractions: `clip/token_fraction` is the share of response tokens whose gradient the clip removed (the paper's
Figure 2), in GSPO every token of a clipped response; `clip/low_fraction` and `clip/high_fraction` are its two parts, by
the bound that was crossed (a dual clip is high); `clip/sequence_fraction` is the share of responses that lost at least
one token's gradient. The effective sample fraction (Σw)² / (T Σw²) is over tokens in every objective, with the ratio
that objective weights the token by, so that objectives compare: 1 when all weights are equal.

Sums are detached and stay on the device: those of clip fractions exact, those of weights in float64, where squares of
float32 do not overflow, the others in the log-probs' dtype. Counts are the host's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from megatron_gspo.policy_loss.finite import abs_max
from megatron_gspo.policy_loss.ratio import ImportanceRatios
from megatron_gspo.policy_loss.segments import Segments
from megatron_gspo.policy_loss.trust_region import Surrogate

Metric = tuple[torch.Tensor, float]


def ratio_metrics(ratios: ImportanceRatios) -> dict[str, Metric]:
    """First and second moments of the log-ratios over tokens and over responses; the same for every objective."""
    # The sum over tokens is that of the responses' sums, [N] numbers: no pass of its own over [T].
    tokens = _moments("ratio/token_log", ratios.token_log, ratios.sequence_sum)
    return tokens | _moments("ratio/sequence_log", ratios.sequence_log, ratios.sequence_log)


def ratio_maxima(ratios: ImportanceRatios) -> dict[str, torch.Tensor]:
    """Largest |log-ratio| of a token and of a response; 0 for a call without responses."""
    return {
        "ratio/token_abs_log_max": ratios.token_abs_log_max,
        "ratio/sequence_abs_log_max": abs_max(ratios.sequence_log),
    }


def surrogate_metrics(surrogate: Surrogate, unit: str, segments: Segments) -> dict[str, Metric]:
    """Clip fractions, and the moments of the importance weights, of a surrogate with one entry a `unit`."""
    low, high, weights = surrogate.clipped_low, surrogate.clipped_high, surrogate.log_ratio.exp().double()
    clipped = low | high
    if unit == "response":  # an entry stands for each of the response's tokens
        entries = torch.stack([low.double(), high.double(), weights, weights.square()])
        low_tokens, high_tokens, weight, weight_squared = (entries @ segments.lengths.double()).unbind()
        clipped_responses = clipped
    else:
        low_tokens, high_tokens = low.count_nonzero(), high.count_nonzero()
        weight, weight_squared = weights.sum(), torch.dot(weights, weights)
        clipped_responses = segments.sum(clipped.float()) > 0
    num_tokens, num_responses = segments.num_tokens, segments.num_responses
    return {
        "clip/token_fraction": (low_tokens + high_tokens, num_tokens),
        "clip/low_fraction": (low_tokens, num_tokens),
        "clip/high_fraction": (high_tokens, num_tokens),
        "clip/sequence_fraction": (clipped_responses.count_nonzero(), num_responses),
        "ratio/weight": (weight, num_tokens),
        "ratio/weight_squared": (weight_squared, num_tokens),
    }


def importance_metrics(weights: torch.Tensor, truncated: torch.Tensor) -> dict[str, Metric]:
    """Mean truncated importance weight, and the share that was truncated, of tokens: [T] float, [T] bool."""
    return {
        "mismatch/importance_weight_mean": (weights.double().sum(), len(weights)),
        "mismatch/importance_truncated_fraction": (truncated.count_nonzero(), len(weights)),
    }


def finalize_metrics(totals: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Turn added-up (sum, count) pairs into the metrics as they are reported; pairs with count 0 measured nothing.

    The spread is the population's. When a ratio overflowed, one weight outweighs all others, and the effective sample
    fraction is given as its limit, 0.
    """
    means = {name: total / count for name, (total, count) in totals.items() if count > 0}
    for name in ("ratio/token_log", "ratio/sequence_log", "mismatch/token_log", "mismatch/sequence_log"):
        if name in means:
            variance = means.pop(f"{name}_squared") - means.pop(name) ** 2
            means[f"{name}_std"] = math.sqrt(max(variance, 0.0))
    if "ratio/weight" in means:
        mean, mean_square = means.pop("ratio/weight"), means.pop("ratio/weight_squared")
        means["ratio/effective_sample_fraction"] = mean**2 / mean_square if math.isfinite(mean_square) else 0.0
    return means


def _moments(name: str, values: torch.Tensor, summands: torch.Tensor) -> dict[str, Metric]:
    """Sums of `values` and of their squares; `summands` are the values, or partial sums of them."""
    values, summands = values.detach(), summands.detach()
    return {name: (summands.sum(), len(values)), f"{name}_squared": (torch.dot(values, values), len(values))}
