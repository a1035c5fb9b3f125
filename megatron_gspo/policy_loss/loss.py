"""The policy loss of one micro-batch: packed log-probs and advantages in, loss and metrics out, in the paper's order.

Importance ratios (eqs. 3, 8, 15), the objective's clipped surrogate, truncated importance weights of the engine that
sampled, aggregation (eqs. 2, 6, 14), and a KL penalty.
Denominators are the mini-batch's, given from outside, so that the gradient does not depend on how the mini-batch is cut
into micro-batches or ranks. Departures from the paper, all off by default: dual clip, truncated importance weights, KL
penalty, aggregations that weight responses by their length.

What `policy_loss` takes, with T response tokens and N responses in this call:

    objective            a name in `OBJECTIVES`, `package.module:attribute`, or an `Objective`
    log_probs            [T] float, of the response tokens under the current policy, packed; carries the gradient
    old_log_probs        [T] float, under the old policy
    advantages           [N] one a response, or [T] one a token (gspo_token, grpo)
    cu_seqlens           [N + 1] int32 or int64; response i owns tokens cu_seqlens[i]:cu_seqlens[i + 1]. N may be 0: the
                         loss is then 0 and still hangs on log_probs, so a rank without responses stays in step
    clip_low, clip_high  ε_low and ε_high; None for the objective's own
    num_sequences        responses in the mini-batch, over all micro-batches and ranks; None for N
    num_tokens           response tokens in the mini-batch likewise; only "token_mean" divides by it; None for T
    dual_clip            largest ratio a negative advantage is learned from, above 1; None for no limit
    aggregation          "sequence_mean", "token_mean" or "constant_length", see `aggregation`
    constant_length      tokens that "constant_length" divides by
    behaviour_log_probs  [T] float, of the engine that sampled the tokens; needed for the next alone
    truncated_importance_cap  C of `truncated_importance`, 1 or more; None multiplies by no such weight
    reference_log_probs  [T] float; when given, `loss/kl` is measured
    kl_coefficient       weight of that KL in the loss
    kl_estimator         "k1", "k2" or "k3", see `kl`
    sequence_ids         [N] what errors call the responses; None numbers them

Everything is computed in float32, or in float64 where log_probs are float64; bfloat16 is widened before any difference
is taken. `loss/policy` is without the penalty and `loss/kl` without its coefficient. Each is a pair of the sum before
division and this call's share of the denominator, so that added up over a mini-batch, sum / count is the mini-batch's.
One wait for the device a call, to refuse what is not finite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megatron_gspo.policy_loss.aggregation import AggregationName, make_aggregation
from megatron_gspo.policy_loss.base import Objective, ObjectiveInputs, PolicyLossOutput
from megatron_gspo.policy_loss.finite import abs_max, refuse_non_finite
from megatron_gspo.policy_loss.kl import KLEstimator, kl_per_token
from megatron_gspo.policy_loss.metrics import (
    Metric,
    importance_metrics,
    ratio_maxima,
    ratio_metrics,
    surrogate_metrics,
)
from megatron_gspo.policy_loss.ratio import ImportanceRatios
from megatron_gspo.policy_loss.registry import OBJECTIVES, resolve_objective
from megatron_gspo.policy_loss.segments import Segments
from megatron_gspo.policy_loss.truncated_importance import truncated_importance
from megatron_gspo.types import UserError


def policy_loss(
    objective: str | Objective,
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    clip_low: float | None = None,
    clip_high: float | None = None,
    num_sequences: int | None = None,
    num_tokens: int | None = None,
    dual_clip: float | None = None,
    aggregation: AggregationName = "sequence_mean",
    constant_length: int | None = None,
    behaviour_log_probs: torch.Tensor | None = None,
    truncated_importance_cap: float | None = None,
    reference_log_probs: torch.Tensor | None = None,
    kl_coefficient: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    sequence_ids: Sequence[object] | None = None,
) -> PolicyLossOutput:
    """Compute this call's part of the mini-batch's loss; options are described in the module's docstring.

    Raises:
        UserError: an option the recipe has wrong, or token advantages for an objective that takes none.
        NonFiniteLogProbError: a log-prob or advantage that is NaN or infinite, naming its response and position.

    Warns:
        WideClipRangeWarning: a clip range made for token ratios, given to an objective with length-normalised ones.
    """
    chosen = resolve_objective(objective) if isinstance(objective, str) else objective
    segments = Segments(cu_seqlens, num_tokens=len(log_probs))
    log_probs = log_probs.to(torch.promote_types(log_probs.dtype, torch.float32))
    given = {"old log-prob": old_log_probs, "advantage": advantages, "reference log-prob": reference_log_probs}
    if truncated_importance_cap is not None:
        given["behaviour log-prob"] = behaviour_log_probs
    constants = {name: values.detach().to(log_probs.dtype) for name, values in given.items() if values is not None}
    _check_shapes(chosen, log_probs, constants, segments)
    ratios = ImportanceRatios(log_probs, constants["old log-prob"], segments)
    others = [abs_max(values) for name, values in constants.items() if name != "old log-prob"]
    refuse_non_finite({"log-prob": log_probs, **constants}, [ratios.token_abs_log_max, *others], segments, sequence_ids)
    clip_range = chosen.clip_range(clip_low, clip_high, dual_clip)
    surrogate = chosen.surrogate(ObjectiveInputs(ratios, constants["advantage"], clip_range))
    weighting = make_aggregation(aggregation, segments, log_probs.dtype, num_sequences, num_tokens, constant_length)
    behaviour, cap = constants.get("behaviour log-prob"), truncated_importance_cap
    values, metrics = _weighted_by_importance(surrogate.values, chosen, ratios, behaviour, cap)
    policy_sum = -weighting.weighted_sum(values, chosen.unit)
    loss = policy_sum / weighting.denominator
    metrics["loss/policy"] = (policy_sum.detach(), weighting.share)
    assert kl_coefficient == 0 or reference_log_probs is not None, "a KL penalty needs the reference's log-probs"
    if reference_log_probs is not None:
        kl = kl_per_token(log_probs, constants["reference log-prob"], kl_estimator)
        kl_sum = weighting.weighted_sum(kl, "token")
        metrics["loss/kl"] = (kl_sum.detach(), weighting.share)
        if kl_coefficient != 0:  # an infinite estimate that is only measured must not become 0 · ∞
            loss = loss + kl_coefficient * kl_sum / weighting.denominator
    metrics |= ratio_metrics(ratios) | surrogate_metrics(surrogate, chosen.unit, segments)
    return PolicyLossOutput(loss, metrics, ratio_maxima(ratios))


def _weighted_by_importance(
    values: torch.Tensor,
    objective: Objective,
    ratios: ImportanceRatios,
    behaviour_log_probs: torch.Tensor | None,
    cap: float | None,
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """The surrogate's values, weighted where there is a cap, and what is measured of the weights."""
    if cap is None:
        return values, {}
    assert behaviour_log_probs is not None, "truncated importance weights need the engine's log-probs"
    unit = objective.ratio_unit or objective.unit
    importance = truncated_importance(ratios.old_log_probs, behaviour_log_probs, ratios.segments, unit, cap)
    return values * importance.of(objective.unit), importance_metrics(*importance.of_tokens())


def _check_shapes(
    objective: Objective, log_probs: torch.Tensor, constants: Mapping[str, torch.Tensor], segments: Segments
) -> None:
    per_token, per_response = (segments.num_tokens,), (segments.num_responses,)
    assert segments.num_responses >= 0, "cu_seqlens is [N + 1]; without responses it is [0]"
    assert log_probs.shape == per_token, f"log-probs are packed, [T], not {tuple(log_probs.shape)}"
    for name, values in constants.items():
        if name != "advantage":
            assert values.shape == per_token, f"{name}s are {tuple(values.shape)}, log-probs {per_token}"
    shape = constants["advantage"].shape
    if shape == per_token != per_response and not objective.takes_token_advantages:
        takers = [name for name, other in OBJECTIVES.items() if other.takes_token_advantages]
        raise UserError(
            f"objective.name is {objective.name!r}, which takes one advantage a response, but there are {shape[0]} for "
            f"{per_response[0]} responses, one a token; objectives that take those: {', '.join(takers)}."
        )
    assert shape in (per_response, per_token), f"advantages are {tuple(shape)}, for {per_response} or {per_token}"
