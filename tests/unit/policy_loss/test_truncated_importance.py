"""Truncated importance weights against a loop over tokens in float64: what they multiply, and what they leave alone."""

import math

import pytest
import torch

from megatron_gspo.policy_loss import NonFiniteLogProbError, finalize_metrics, policy_loss
from megatron_gspo.types import UserError
from tests.unit.policy_loss.paper_equations import Case, make_case, reference, totals

LENGTHS = (5, 1, 9, 3, 7, 2, 4, 6)
CLIP = {"gspo": (3e-4, 4e-4), "gspo_token": (3e-4, 4e-4), "grpo": (0.2, 0.27)}
SPREAD = {"gspo": 2e-3, "gspo_token": 2e-3, "grpo": 0.3}
CAP = 1.1


def engine_log_probs(case: Case, spread: float = 0.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return case.old_log_probs + spread * torch.randn(len(case.old_log_probs), generator=generator, dtype=torch.float64)


def weights_by_hand(objective: str, case: Case, engine: torch.Tensor, cap: float) -> list[float]:
    """min(π_old / π_engine, cap): of each token, or length-normalised of the response that it belongs to."""
    logs = [float(old - behaviour) for old, behaviour in zip(case.old_log_probs, engine, strict=True)]
    found, start = [], 0
    for length in case.lengths:
        own = logs[start : start + length]
        start += length
        found += own if objective == "grpo" else [math.fsum(own) / length] * length
    return [min(math.exp(log), cap) for log in found]


@pytest.mark.parametrize("objective", sorted(CLIP))
def test_each_tokens_loss_and_gradient_are_multiplied_by_its_weight(objective):
    case = make_case(LENGTHS, spread=SPREAD[objective], seed=3)
    engine = engine_log_probs(case)
    weights = weights_by_hand(objective, case, engine, CAP)
    assert 0 < sum(weight == CAP for weight in weights) < len(weights), "some weights are truncated and some are not"
    expected = reference(objective, case, *CLIP[objective], importance=weights)
    assert any(expected.clipped)

    output = policy_loss(objective, *case.arguments(), behaviour_log_probs=engine, truncated_importance_cap=CAP)
    output.loss.backward()

    assert output.loss.item() == pytest.approx(expected.loss, rel=1e-12)
    torch.testing.assert_close(
        case.log_probs.grad, torch.tensor(expected.gradient, dtype=torch.float64), rtol=1e-12, atol=0
    )
    metrics = finalize_metrics(totals([output]))
    assert metrics["mismatch/importance_weight_mean"] == pytest.approx(sum(weights) / len(weights), rel=1e-12)
    truncated = sum(weight == CAP for weight in weights) / len(weights)
    assert metrics["mismatch/importance_truncated_fraction"] == pytest.approx(truncated, rel=1e-12)


@pytest.mark.parametrize("objective", sorted(CLIP))
def test_weights_change_neither_ratios_nor_what_is_clipped(objective):
    case = make_case(LENGTHS, spread=SPREAD[objective], seed=3)
    plain = policy_loss(objective, *case.arguments())
    weighted = policy_loss(
        objective, *case.arguments(), behaviour_log_probs=engine_log_probs(case), truncated_importance_cap=CAP
    )
    for name, pair in plain.metrics.items():
        if name != "loss/policy":
            assert [float(part) for part in weighted.metrics[name]] == [float(part) for part in pair], name
    assert "mismatch/importance_weight_mean" not in plain.metrics


@pytest.mark.parametrize("objective", sorted(CLIP))
def test_an_engine_that_agrees_changes_nothing(objective):
    case = make_case(LENGTHS, spread=SPREAD[objective], seed=3)
    agreeing = {"behaviour_log_probs": case.old_log_probs, "truncated_importance_cap": 1.0}
    weighted, plain = policy_loss(objective, *case.arguments(), **agreeing), policy_loss(objective, *case.arguments())
    assert weighted.loss.item() == plain.loss.item()
    assert finalize_metrics(totals([weighted]))["mismatch/importance_truncated_fraction"] == 0


def test_a_token_the_engine_hardly_ever_samples_counts_no_more_than_the_cap():
    log_probs = torch.tensor([-1.0, -1.0], dtype=torch.float64, requires_grad=True)
    engine = torch.tensor([-1.0, -900.0], dtype=torch.float64)
    given = {"behaviour_log_probs": engine, "truncated_importance_cap": 2.0}
    policy_loss("grpo", log_probs, log_probs.detach(), torch.ones(1), torch.tensor([0, 2]), **given).loss.backward()
    assert log_probs.grad.tolist() == [-0.5, -1.0]


def test_what_cannot_be_a_weight_is_refused():
    case = make_case((2, 3), spread=0.1)
    with pytest.raises(UserError, match=r"objective\.truncated_importance_cap is 0\.5; it must be 1 or more"):
        policy_loss("grpo", *case.arguments(), behaviour_log_probs=case.old_log_probs, truncated_importance_cap=0.5)
    engine = case.old_log_probs.clone()
    engine[3] = -math.inf
    with pytest.raises(NonFiniteLogProbError, match=r"behaviour log-prob of token 1 \(from 0\) of response 1 is -inf"):
        policy_loss("grpo", *case.arguments(), behaviour_log_probs=engine, truncated_importance_cap=2.0)
