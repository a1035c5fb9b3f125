"""Values and gradients against the paper's equations, written out by hand in float64."""

import math

import pytest
import torch

from megatron_gspo.policy_loss import OBJECTIVES, policy_loss
from tests.unit.policy_loss.paper_equations import Case, make_case, reference

LENGTHS = (5, 1, 9, 3, 7, 2, 4, 6)
SPREAD = {"gspo": 2e-3, "gspo_token": 2e-3, "grpo": 0.3}  # wide enough that each objective clips some of its own units


def gradient_of(objective: str, case: Case, **options: object) -> torch.Tensor:
    case.log_probs.grad = None
    policy_loss(objective, *case.arguments(), **options).loss.backward()
    return case.log_probs.grad


@pytest.mark.parametrize(
    ("objective", "clip"), [("gspo", (3e-4, 4e-4)), ("gspo_token", (3e-4, 4e-4)), ("grpo", (0.2, 0.27))]
)
def test_value_and_gradient_equal_the_papers_equations_under_the_papers_clip_range(objective, clip):
    case = make_case(LENGTHS, spread=SPREAD[objective], seed=3)
    expected = reference(objective, case, *clip)
    assert 0 < sum(expected.clipped) < len(expected.clipped), "the case must have clipped and unclipped tokens"

    output = policy_loss(objective, *case.arguments())
    output.loss.backward()

    assert output.loss.item() == pytest.approx(expected.loss, rel=1e-12)
    torch.testing.assert_close(
        case.log_probs.grad, torch.tensor(expected.gradient, dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_gspo_gradient_is_eq_11_when_nothing_is_clipped():
    case = make_case((2, 3), spread=1e-5)
    log_ratio = (case.log_probs - case.old_log_probs).detach()
    s = [math.exp(float(log_ratio[:2].mean())), math.exp(float(log_ratio[2:].mean()))]
    a = case.advantages.tolist()
    expected = [-s[0] * a[0] / 2 / 2] * 2 + [-s[1] * a[1] / 3 / 2] * 3

    torch.testing.assert_close(
        gradient_of("gspo", case), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_grpo_gradient_is_eq_13_when_nothing_is_clipped():
    case = make_case((2, 3), spread=0.01)
    w = torch.exp(case.log_probs - case.old_log_probs).detach()
    a_over_length = torch.tensor([case.advantages[0] / 2] * 2 + [case.advantages[1] / 3] * 3)

    torch.testing.assert_close(gradient_of("grpo", case), -w * a_over_length / 2, rtol=1e-12, atol=0)


def test_gspo_token_gradient_is_eq_17_with_an_advantage_of_its_own_for_each_token():
    case = make_case((2, 3), spread=1e-5, token_advantages=True)
    log_ratio = (case.log_probs - case.old_log_probs).detach()
    s_over_length = torch.stack([log_ratio[:2].mean().exp() / 2] * 2 + [log_ratio[2:].mean().exp() / 3] * 3)

    torch.testing.assert_close(
        gradient_of("gspo_token", case), -s_over_length * case.advantages / 2, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("objective", ["gspo_token", "grpo"])
def test_token_advantages_give_the_value_and_gradient_of_the_token_level_equations(objective):
    case = make_case(LENGTHS, spread=SPREAD[objective], seed=5, token_advantages=True)
    expected = reference(objective, case, OBJECTIVES[objective].clip_low, OBJECTIVES[objective].clip_high)
    assert 0 < sum(expected.clipped) < len(expected.clipped)

    output = policy_loss(objective, *case.arguments())
    output.loss.backward()

    assert output.loss.item() == pytest.approx(expected.loss, rel=1e-12)
    torch.testing.assert_close(
        case.log_probs.grad, torch.tensor(expected.gradient, dtype=torch.float64), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("seed", range(5))
def test_gspo_token_is_gspo_when_the_tokens_of_a_response_share_their_advantage(seed):
    case = make_case(LENGTHS, spread=1e-3, seed=seed)
    gspo, gspo_token = (policy_loss(name, *case.arguments()) for name in ("gspo", "gspo_token"))

    torch.testing.assert_close(gspo_token.loss, gspo.loss, rtol=1e-13, atol=0)
    for name in gspo.metrics:
        found, expected = ([float(part) for part in of.metrics[name]] for of in (gspo_token, gspo))
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-14)
    gspo_gradient, token_gradient = gradient_of("gspo", case), gradient_of("gspo_token", case)
    assert torch.equal(gspo_gradient == 0, token_gradient == 0), "the same tokens are clipped"
    torch.testing.assert_close(token_gradient, gspo_gradient, rtol=1e-12, atol=0)


def test_gspo_gradient_weights_all_tokens_of_a_response_equally():
    case = make_case((6,), spread=1e-4)
    gradient = gradient_of("gspo", case, clip_low=0.01, clip_high=0.01)
    assert torch.equal(gradient, gradient[:1].expand(6))
    assert gradient[0] != 0


def test_grpo_gradient_weights_tokens_by_their_own_ratios():
    case = make_case((6,), spread=1e-4)
    gradient = gradient_of("grpo", case)
    ratios = torch.exp(case.log_probs - case.old_log_probs).detach()
    assert len(set(gradient.tolist())) == 6
    torch.testing.assert_close(gradient / gradient[0], ratios / ratios[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_wild_token_ratios_whose_mean_log_is_zero_are_clipped_by_grpo_and_not_by_gspo(sign):
    old = torch.full((6,), -3.0, dtype=torch.float64)
    log_ratio = torch.tensor([2.0, -2.0, 1.5, -1.5, 0.75, -0.75], dtype=torch.float64)
    case = Case((old + log_ratio).requires_grad_(), old, torch.tensor([sign], dtype=torch.float64), (6,))

    gspo, grpo = gradient_of("gspo", case).clone(), gradient_of("grpo", case).clone()

    torch.testing.assert_close(gspo, torch.full((6,), -sign / 6, dtype=torch.float64), rtol=1e-12, atol=0)
    assert torch.equal(grpo == 0, sign * log_ratio > 0), "GRPO drops the half that ran ahead"
