"""Laws that hold for every mini-batch: cutting, ordering and filling up with nothing change neither value nor gradient."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gspo.policy_loss import OBJECTIVES, finalize_metrics, policy_loss
from tests.unit.policy_loss.paper_equations import Case, make_case, totals

MINI_BATCHES = {
    "objective": st.sampled_from(sorted(OBJECTIVES)),
    "aggregation": st.sampled_from(["sequence_mean", "token_mean", "constant_length"]),
    "lengths": st.lists(st.integers(1, 12), min_size=1, max_size=10).map(tuple),
    "seed": st.integers(0, 2**31),
    "token_advantages": st.booleans(),
}
CAPS = st.sampled_from([None, 1.0, 1.3])  # of truncated importance weights


def shuffled_pieces(num_responses: int, seed: int) -> list[list[int]]:
    """All responses in another order, cut into up to five micro-batches, some of them empty."""
    generator = random.Random(seed)
    order = generator.sample(range(num_responses), num_responses)
    cuts = sorted(generator.choices(range(num_responses + 1), k=4))
    return [order[start:end] for start, end in zip([0, *cuts], [*cuts, num_responses], strict=True)]


@settings(max_examples=80, deadline=None)
@given(cap=CAPS, **MINI_BATCHES)
def test_micro_batches_packing_order_and_empty_micro_batches_change_nothing(
    objective, aggregation, lengths, seed, token_advantages, cap
):
    spread = 0.3 if objective == "grpo" else 1e-3
    case = make_case(lengths, spread=spread, seed=seed, token_advantages=token_advantages and objective != "gspo")
    reference_case = make_case(lengths, spread=0.2, seed=seed + 1)
    options = {
        "num_sequences": len(lengths),
        "num_tokens": sum(lengths),
        "aggregation": aggregation,
        "constant_length": 7,
        "kl_coefficient": 0.05,
        "truncated_importance_cap": cap,
    }

    def loss_of(responses: list[int]):
        other = reference_case.select(responses)
        return policy_loss(
            objective,
            *case.select(responses).arguments(),
            reference_log_probs=other.log_probs,
            behaviour_log_probs=other.old_log_probs,
            **options,
        )

    whole = loss_of(list(range(len(lengths))))
    whole.loss.backward()
    expected_gradient, case.log_probs.grad = case.log_probs.grad, None
    parts = [loss_of(piece) for piece in shuffled_pieces(len(lengths), seed)]
    for part in parts:
        part.loss.backward()

    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(case.log_probs.grad, expected_gradient, rtol=1e-11, atol=1e-15)
    assert finalize_metrics(totals(parts)) == pytest.approx(finalize_metrics(totals([whole])), rel=1e-9, abs=1e-11)
    for name, maximum in whole.maxima.items():
        assert max(part.maxima[name] for part in parts) == pytest.approx(float(maximum), rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(**MINI_BATCHES)
def test_the_mini_batchs_loss_is_the_sum_over_count_of_its_metrics(
    objective, aggregation, lengths, seed, token_advantages
):
    case = make_case(lengths, spread=0.1, seed=seed, token_advantages=token_advantages and objective != "gspo")
    options = {
        "num_sequences": len(lengths),
        "num_tokens": sum(lengths),
        "aggregation": aggregation,
        "constant_length": 5,
    }
    parts = [
        policy_loss(objective, *case.select(piece).arguments(), **options)
        for piece in shuffled_pieces(len(lengths), seed)
    ]
    loss = sum(part.loss.item() for part in parts)
    assert finalize_metrics(totals(parts))["loss/policy"] == pytest.approx(loss, rel=1e-11, abs=1e-14)


def test_loss_is_scaled_by_the_mini_batch_and_not_by_the_micro_batch():
    case = make_case((3, 3, 3, 3), spread=1e-5)
    alone = policy_loss("gspo", *case.select([0]).arguments(), num_sequences=4).loss
    torch.testing.assert_close(4 * alone, policy_loss("gspo", *case.select([0]).arguments()).loss)


def test_gspo_is_not_weighted_by_length_unless_asked_to():
    case = make_case((2, 18), spread=1e-6)
    case.advantages.fill_(1.0)

    def response_weights(**options: object) -> list[float]:
        case.log_probs.grad = None
        policy_loss("gspo", *case.arguments(), **options).loss.backward()
        return [-float(piece.sum()) for piece in case.log_probs.grad.split(case.lengths)]

    assert response_weights() == pytest.approx([0.5, 0.5], rel=1e-5)
    assert response_weights(aggregation="token_mean") == pytest.approx([0.1, 0.9], rel=1e-5)
    assert response_weights(aggregation="constant_length", constant_length=40) == pytest.approx(
        [1 / 40, 9 / 40], rel=1e-5
    )


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "constant_length"])
@pytest.mark.parametrize("num_sequences", [None, 8])
def test_a_rank_without_responses_has_loss_zero_that_still_reaches_its_parameters(
    objective, aggregation, num_sequences
):
    weight = torch.ones(3, requires_grad=True)
    log_probs = weight[:0] * 2.0
    output = policy_loss(
        objective,
        log_probs,
        torch.zeros(0),
        torch.zeros(0),
        torch.tensor([0]),
        aggregation=aggregation,
        constant_length=4,
        num_sequences=num_sequences,
        reference_log_probs=torch.zeros(0),
        kl_coefficient=0.1,
    )
    assert output.loss.requires_grad
    output.loss.backward()
    assert output.loss.item() == 0
    assert torch.equal(weight.grad, torch.zeros(3))
    assert all(float(total) == 0 and float(count) == 0 for total, count in output.metrics.values())
    assert all(float(maximum) == 0 for maximum in output.maxima.values())


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_a_response_without_tokens_adds_neither_loss_nor_gradient(objective):
    case = make_case((3, 2), spread=1e-5, seed=1)
    with_nothing = Case(
        case.log_probs, case.old_log_probs, torch.tensor([*case.advantages[:1], 5.0, *case.advantages[1:]]), (3, 0, 2)
    )
    expected = policy_loss(objective, *case.arguments(), num_sequences=3).loss
    torch.testing.assert_close(policy_loss(objective, *with_nothing.arguments(), num_sequences=3).loss, expected)


@pytest.mark.parametrize("cu_dtype", [torch.int32, torch.int64])
def test_float32_agrees_with_float64_to_round_off(cu_dtype):
    case = make_case((50, 20, 80, 10), spread=1e-3, seed=4)
    single = case.log_probs.detach().float().requires_grad_()
    for objective in OBJECTIVES:
        case.log_probs.grad = single.grad = None
        policy_loss(objective, *case.arguments(), clip_low=0.009, clip_high=0.009).loss.backward()
        policy_loss(
            objective,
            single,
            case.old_log_probs.float(),
            case.advantages.float(),
            case.cu_seqlens.to(cu_dtype),
            clip_low=0.009,
            clip_high=0.009,
        ).loss.backward()
        torch.testing.assert_close(single.grad.double(), case.log_probs.grad, rtol=1e-6, atol=1e-9)


def test_bfloat16_log_probs_are_widened_before_the_difference_is_taken():
    log_probs = torch.full((4,), -2.0, dtype=torch.bfloat16, requires_grad=True)
    old = torch.full((4,), -2.0005)  # bfloat16 would round this to -2
    output = policy_loss("gspo", log_probs, old, torch.ones(1), torch.tensor([0, 4]))
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert log_probs.grad.dtype == torch.bfloat16
    assert float(output.maxima["ratio/sequence_abs_log_max"]) == pytest.approx(5e-4, rel=1e-3)
