"""Rewards of mathematical and of exact answers."""

import pytest

from megatron_gspo.reward.exact import exact
from megatron_gspo.reward.math import math
from megatron_gspo.types import Prompt


def prompt_with(answer: str) -> Prompt:
    return Prompt(id="p:1", token_ids=(1,), text="?", answer=answer)


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("72", r"So it is \boxed{72}."),
        ("72", r"First \boxed{71}; no: \boxed{72}, which is less than 100"),
        ("72", "48/2 = <<48/2=24>>24\n48+24 = 72\n#### 72"),
        ("10", "12/60 = $<<12/60=0.2>>0.2 a minute, so 0.2 x 50 = $10.\n#### 10"),
        ("1,080", "That makes\n#### 1080"),
        ("1080", "#### $1,080"),
        ("72", "The final answer is 72."),
        ("72", "She has $72."),
        ("72", r"#### Step 3" "\n" r"So \boxed{72}"),
        ("033", r"\boxed{33}"),
        ("33", r"\boxed{033}"),
        ("204", r"The walk takes $\boxed{204}$ minutes"),
        ("0.5", r"\boxed{\frac{1}{2}}"),
        (r"\frac{3}{4}", r"\boxed{0.75}"),
        (r"Hence $x = \boxed{\frac{3}{4}}$.", r"\boxed{3/4}"),
        ("x^2+1", "$1+x^2$"),
        ("18.", "#### 18"),
    ],
)
def test_a_right_final_answer_scores_1(answer: str, response: str) -> None:
    assert math(prompt_with(answer), response, True) == 1.0


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("72", ""),
        ("72", "####"),
        ("72", r"\boxed{71}"),
        ("72", r"72, so \boxed{71}"),
        ("72", r"\boxed{72}; no: \boxed{71}"),
        ("72", r"\boxed{71, 72}"),
        ("72", "72 is too many\n#### 71"),
        ("5", "-5"),
        ("72", "I do not know"),
    ],
)
def test_a_wrong_final_answer_scores_0(answer: str, response: str) -> None:
    assert math(prompt_with(answer), response, True) == 0.0


@pytest.mark.parametrize(
    ("response", "reward"), [(r"\boxed{72} and then", 1.0), ("so\n#### 72", 1.0), ("48+24 is 72", 0.0)]
)
def test_a_response_cut_off_needs_a_marked_answer(response: str, reward: float) -> None:
    assert math(prompt_with("72"), response, False) == reward


def test_a_right_answer_that_is_no_mathematics_is_an_error() -> None:
    with pytest.raises(ValueError, match="cannot be read as mathematics"):
        math(prompt_with(r"so \boxed{}"), "72", True)


@pytest.mark.parametrize(
    ("response", "finished", "reward"),
    [
        ("+4=7-7=0*2=0", True, 1.0),
        ("0", True, 1.0),
        ("+4=7-7=1*2=0", True, 1.0),  # only the last result counts
        ("+4=7-7=0*2=0", False, 0.0),
        ("+4=7-7=0*2=4", True, 0.0),
        ("+4=7-7=0*2=10", True, 0.0),
        ("+4=7-7=0*2=", True, 0.0),
        ("", True, 0.0),
    ],
)
def test_exact_wants_the_last_result_right_and_the_response_ended(response: str, finished: bool, reward: float) -> None:
    assert exact(prompt_with("0"), response, finished) == reward
