"""What is clipped, and that exactly that has no gradient; dual clip; clip ranges that make no sense."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gspo.policy_loss import OBJECTIVES, WideClipRangeWarning, policy_loss
from megatron_gspo.types import UserError
from tests.unit.policy_loss.paper_equations import Case, make_case, reference


def single_tokens(log_ratios: list[float], advantages: list[float], dtype: torch.dtype = torch.float64) -> Case:
    """Responses of one token each, where every objective's ratio is the token's."""
    old = torch.full((len(log_ratios),), -4.0, dtype=dtype)
    log_probs = (old + torch.tensor(log_ratios, dtype=dtype)).requires_grad_()
    return Case(log_probs, old, torch.tensor(advantages, dtype=dtype), (1,) * len(log_ratios))


@settings(max_examples=60, deadline=None)
@given(
    objective=st.sampled_from(["gspo", "gspo_token", "grpo"]),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=9).map(tuple),
    seed=st.integers(0, 2**31),
    dual_clip=st.sampled_from([None, 1.0002, 1.1, 3.0]),
    zero_advantages=st.booleans(),
)
def test_clip_fractions_count_exactly_the_tokens_that_lost_their_gradient(
    objective, lengths, seed, dual_clip, zero_advantages
):
    case = make_case(lengths, spread=0.3 if objective == "grpo" else 1e-3, seed=seed)
    if zero_advantages:
        case.advantages[::2] = 0.0
    chosen = OBJECTIVES[objective]
    expected = reference(objective, case, chosen.clip_low, chosen.clip_high, dual=dual_clip or math.inf)

    output = policy_loss(objective, *case.arguments(), dual_clip=dual_clip)
    output.loss.backward()

    token_advantages = case.advantages.repeat_interleave(torch.tensor(case.lengths))
    lost = (case.log_probs.grad == 0) & (token_advantages != 0)
    clipped, count = output.metrics["clip/token_fraction"]
    assert lost.tolist() == expected.clipped
    assert (int(clipped), int(count)) == (int(lost.sum()), sum(lengths))
    log_ratio = (case.log_probs - case.old_log_probs).detach()
    means = torch.stack([piece.mean() for piece in log_ratio.split(case.lengths)]).repeat_interleave(
        torch.tensor(case.lengths)
    )
    below = (log_ratio if objective == "grpo" else means) < 0
    assert int(output.metrics["clip/low_fraction"][0]) == int((lost & below).sum())
    assert int(output.metrics["clip/high_fraction"][0]) == int((lost & ~below).sum())
    responses, num_responses = output.metrics["clip/sequence_fraction"]
    assert int(responses) == sum(bool(piece.any()) for piece in lost.split(case.lengths))
    assert int(num_responses) == len(lengths)


def test_the_sign_of_the_advantage_decides_which_side_clips():
    far = math.log(1.5)
    case = single_tokens([far, -far, far, -far], [1.0, 1.0, -1.0, -1.0])
    output = policy_loss("grpo", *case.arguments())
    output.loss.backward()
    assert (case.log_probs.grad == 0).tolist() == [True, False, False, True]
    assert int(output.metrics["clip/high_fraction"][0]) == int(output.metrics["clip/low_fraction"][0]) == 1


def test_a_response_with_advantage_zero_is_never_counted_as_clipped():
    output = policy_loss("gspo", *single_tokens([5.0, -5.0], [0.0, 0.0]).arguments(), dual_clip=1.5)
    assert float(output.metrics["clip/token_fraction"][0]) == 0
    assert output.loss.item() == 0


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_a_range_of_zero_still_learns_from_a_policy_that_has_not_moved(objective):
    case = make_case((3, 4), spread=0.0)
    output = policy_loss(objective, *case.arguments(), clip_low=0.0, clip_high=0.0)
    output.loss.backward()
    assert (case.log_probs.grad != 0).all()
    assert float(output.metrics["clip/token_fraction"][0]) == 0


def test_in_gspo_every_token_of_a_clipped_response_counts():
    old = torch.zeros(10, dtype=torch.float64)
    log_probs = torch.cat([torch.full((7,), 0.01), torch.zeros(3)]).double().requires_grad_()
    case = Case(log_probs, old, torch.tensor([1.0, 1.0], dtype=torch.float64), (7, 3))
    metrics = policy_loss("gspo", *case.arguments()).metrics
    assert [float(part) for part in metrics["clip/token_fraction"]] == [7, 10]
    assert [float(part) for part in metrics["clip/sequence_fraction"]] == [1, 2]


@pytest.mark.parametrize(("nudge", "kept"), [(1 - 1e-9, True), (1.0, True), (1 + 1e-9, False)])
def test_the_paper_sized_range_is_resolved_to_a_billionth_of_itself(nudge, kept):
    old = torch.zeros(2, dtype=torch.float64)
    log_probs = torch.tensor([math.log1p(4e-4) * nudge, math.log1p(-3e-4) * nudge], dtype=torch.float64)
    case = Case(log_probs.requires_grad_(), old, torch.tensor([1.0, -1.0], dtype=torch.float64), (1, 1))
    output = policy_loss("gspo", *case.arguments())
    output.loss.backward()
    assert (case.log_probs.grad != 0).tolist() == [kept, kept]
    assert int(output.metrics["clip/token_fraction"][0]) == (0 if kept else 2)


def test_dual_clip_takes_the_gradient_of_runaway_negative_responses_only():
    case = single_tokens([math.log(2.9), math.log(3.1), math.log(3.1), 0.0], [-1.0, -1.0, 1.0, -1.0])
    output = policy_loss("grpo", *case.arguments(), clip_high=9.0, dual_clip=3.0)
    output.loss.backward()
    assert (case.log_probs.grad == 0).tolist() == [False, True, False, False]
    assert output.loss.item() == pytest.approx((2.9 + 3.0 - 3.1 + 1.0) / 4)


def test_dual_clip_does_not_zero_all_negative_samples():
    """The peers' trap: a cap on the loss itself (0.01, say) silences every response with a negative advantage."""
    case = make_case((4,) * 16, spread=1e-4, seed=1)
    case.advantages.copy_(-case.advantages.abs())
    policy_loss("gspo", *case.arguments(), clip_low=1e-3, dual_clip=1.01).loss.backward()
    assert (case.log_probs.grad > 0).all()


@pytest.mark.parametrize("dual_clip", [1.0, 0.5, -1.0, math.nan])
def test_dual_clip_at_or_below_one_is_refused(dual_clip):
    with pytest.raises(UserError, match=r"objective\.dual_clip .* above 1"):
        policy_loss("gspo", *make_case((2,), spread=0.1).arguments(), dual_clip=dual_clip)


@pytest.mark.parametrize(
    "option", [{"clip_low": -0.1}, {"clip_low": 1.1}, {"clip_low": math.nan}, {"clip_high": -1e-9}]
)
def test_a_clip_range_that_is_none_is_refused_by_field(option):
    (field,) = option
    with pytest.raises(UserError, match=rf"objective\.{field}"):
        policy_loss("grpo", *make_case((2,), spread=0.1).arguments(), **option)


def test_clip_low_of_one_and_infinite_clip_high_never_clip():
    case = single_tokens([9.0, -9.0, 9.0, -9.0], [1.0, 1.0, -1.0, -1.0])
    output = policy_loss("grpo", *case.arguments(), clip_low=1.0, clip_high=math.inf)
    output.loss.backward()
    assert (case.log_probs.grad != 0).all()
    assert float(output.metrics["clip/token_fraction"][0]) == 0


@pytest.mark.parametrize("objective", ["gspo", "gspo_token"])
@pytest.mark.parametrize("option", [{"clip_low": 0.2}, {"clip_high": 0.27}, {"clip_high": 0.0101}])
def test_gspo_with_grpos_clip_range_warns_and_says_why(objective, option):
    with pytest.warns(WideClipRangeWarning, match=r"too wide for gspo.*0\.0003 and 0\.0004"):
        policy_loss(objective, *make_case((2,), spread=1e-4).arguments(), **option)


def test_the_papers_ranges_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for objective in OBJECTIVES:
            policy_loss(objective, *make_case((2,), spread=1e-4).arguments())
        policy_loss("gspo", *make_case((2,), spread=1e-4).arguments(), clip_low=0.01, clip_high=0.01)


def test_gspo_with_grpos_clip_range_never_clips_what_the_papers_range_does():
    """The peers' mistake, measured: tokens far from their old probability, and a 0.2 range that sees none of it."""
    case = make_case((200,) * 20, spread=0.1, seed=2)
    with pytest.warns(WideClipRangeWarning):
        wide = policy_loss("gspo", *case.arguments(), clip_low=0.2, clip_high=0.27).metrics["clip/token_fraction"]
    paper = policy_loss("gspo", *case.arguments()).metrics["clip/token_fraction"]
    assert float(wide[0]) == 0
    assert float(paper[0] / paper[1]) > 0.2


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_a_runaway_ratio_that_is_clipped_leaves_loss_and_gradient_finite(objective):
    """exp(200) overflows float32; 0 · ∞ in the backward of a clip after the exponential would be NaN."""
    case = single_tokens([200.0, 0.0, 200.0], [1.0, 1.0, 0.0], torch.float32)
    output = policy_loss(objective, *case.arguments())
    output.loss.backward()
    assert output.loss.item() == pytest.approx(-(2.0 + OBJECTIVES[objective].clip_high) / 3, rel=1e-6)
    torch.testing.assert_close(case.log_probs.grad, torch.tensor([0.0, -1 / 3, 0.0]))


def test_a_runaway_ratio_that_is_not_clipped_is_infinite_and_not_capped_in_silence():
    case = single_tokens([200.0, 0.0], [-1.0, 1.0], torch.float32)
    assert policy_loss("grpo", *case.arguments()).loss.item() == math.inf
    assert policy_loss("grpo", *case.arguments(), dual_clip=3.0).loss.item() == pytest.approx(1.0)
