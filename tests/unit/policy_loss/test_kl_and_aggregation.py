"""KL estimators against sums over a whole vocabulary, and aggregations against their weights."""

import pytest
import torch

from megatron_gspo.policy_loss import finalize_metrics, policy_loss
from megatron_gspo.policy_loss.kl import kl_per_token
from megatron_gspo.types import UserError
from tests.unit.policy_loss.paper_equations import make_case, reference, totals


def _policy_and_reference() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits, reference_logits = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), reference_logits.log_softmax(0)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_have_the_kl_divergence_as_their_mean(estimator):
    logits, reference_log_probs = _policy_and_reference()
    log_probs = logits.log_softmax(0)
    mean = (log_probs.exp() * kl_per_token(log_probs, reference_log_probs, estimator)).sum()
    torch.testing.assert_close(mean, (log_probs.exp() * (log_probs - reference_log_probs)).sum())


def test_estimators_have_the_mean_gradients_that_their_documentation_says():
    logits, reference_log_probs = _policy_and_reference()
    log_probs = logits.log_softmax(0)
    to_reference = (log_probs.exp() * (log_probs - reference_log_probs)).sum()
    from_reference = (reference_log_probs.exp() * (reference_log_probs - log_probs)).sum()

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    def mean_gradient(estimator: str) -> torch.Tensor:
        return gradient((log_probs.exp().detach() * kl_per_token(log_probs, reference_log_probs, estimator)).sum())

    torch.testing.assert_close(mean_gradient("k1"), torch.zeros_like(logits))
    torch.testing.assert_close(mean_gradient("k2"), gradient(to_reference))
    torch.testing.assert_close(mean_gradient("k3"), gradient(from_reference))


@pytest.mark.parametrize(
    ("estimator", "per_token_gradient"),
    [("k1", torch.ones_like), ("k2", lambda d: d), ("k3", lambda d: 1 - torch.exp(-d))],
)
def test_the_penalty_adds_its_closed_form_gradient_to_the_policys(estimator, per_token_gradient):
    case = make_case((2, 5), spread=1e-5)
    reference_log_probs = case.old_log_probs - 0.3
    policy_loss("gspo", *case.arguments()).loss.backward()
    without, case.log_probs.grad = case.log_probs.grad, None

    options = {"reference_log_probs": reference_log_probs, "kl_coefficient": 0.1, "kl_estimator": estimator}
    policy_loss("gspo", *case.arguments(), **options).loss.backward()

    difference = (case.log_probs - reference_log_probs).detach()
    weights = torch.tensor([1 / 4] * 2 + [1 / 10] * 5, dtype=torch.float64)
    torch.testing.assert_close(case.log_probs.grad - without, 0.1 * weights * per_token_gradient(difference))


def test_a_reference_without_a_coefficient_is_measured_and_does_not_touch_the_loss():
    case = make_case((2, 5), spread=1e-3)
    far = case.old_log_probs - 2000.0
    measured = policy_loss("grpo", *case.arguments(), reference_log_probs=-far)
    assert torch.equal(measured.loss, policy_loss("grpo", *case.arguments()).loss)
    assert float(measured.metrics["loss/kl"][0]) == float("inf")


def test_loss_kl_is_the_mean_over_responses_without_the_coefficient():
    case = make_case((2, 5), spread=0.1)
    reference_log_probs = case.old_log_probs - 0.3
    kl = 0.5 * (case.log_probs - reference_log_probs).detach().square()
    output = policy_loss(
        "grpo", *case.arguments(), reference_log_probs=reference_log_probs, kl_coefficient=7.0, kl_estimator="k2"
    )
    metrics = finalize_metrics(totals([output]))
    assert metrics["loss/kl"] == pytest.approx(float(kl[:2].mean() + kl[2:].mean()) / 2)
    assert output.loss.item() == pytest.approx(metrics["loss/policy"] + 7.0 * metrics["loss/kl"])


@pytest.mark.parametrize("objective", ["gspo", "gspo_token", "grpo"])
@pytest.mark.parametrize(
    ("aggregation", "weights"),
    [
        ("sequence_mean", [1 / 8, 1 / 8, 1 / 8]),
        ("token_mean", [2 / 90, 6 / 90, 4 / 90]),
        ("constant_length", [2 / (8 * 16), 6 / (8 * 16), 4 / (8 * 16)]),
    ],
)
def test_aggregations_weight_responses_as_documented_with_global_denominators(objective, aggregation, weights):
    case = make_case((2, 6, 4), spread=0.002, seed=6)
    expected = reference(objective, case, 0.001, 0.001, weights=weights)

    output = policy_loss(
        objective,
        *case.arguments(),
        clip_low=0.001,
        clip_high=0.001,
        aggregation=aggregation,
        num_sequences=8,
        num_tokens=90,
        constant_length=16,
    )
    output.loss.backward()

    assert output.loss.item() == pytest.approx(expected.loss, rel=1e-12)
    torch.testing.assert_close(
        case.log_probs.grad, torch.tensor(expected.gradient, dtype=torch.float64), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"aggregation": "seqence_mean"},
            r"objective\.aggregation is 'seqence_mean' \(did you mean 'sequence_mean'\?\)",
        ),
        ({"aggregation": "constant_length"}, r"objective\.constant_length is None"),
        ({"aggregation": "constant_length", "constant_length": 0}, r"objective\.constant_length is 0"),
    ],
)
def test_an_impossible_aggregation_is_refused_by_field(options, sentence):
    with pytest.raises(UserError, match=sentence):
        policy_loss("gspo", *make_case((2,), spread=1e-4).arguments(), **options)


def test_an_unknown_kl_estimator_is_refused_with_the_known_ones():
    case = make_case((2,), spread=1e-4)
    with pytest.raises(UserError, match=r"objective\.kl_estimator is 'k4'.*accepted: k1, k2, k3"):
        policy_loss("gspo", *case.arguments(), reference_log_probs=case.old_log_probs, kl_estimator="k4")
