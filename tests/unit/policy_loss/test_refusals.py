"""What the policy loss refuses, and how objectives are found."""

import math
import subprocess
import sys

import pytest
import torch

from megatron_gspo.policy_loss import OBJECTIVES, NonFiniteLogProbError, policy_loss, resolve_objective
from megatron_gspo.types import UserError
from tests.unit.policy_loss.paper_equations import make_case

MY_OBJECTIVES = """
import torch
from megatron_gspo.policy_loss import Objective, ObjectiveInputs, Surrogate

def reinforce(inputs: ObjectiveInputs) -> Surrogate:
    never = torch.zeros_like(inputs.token_advantages, dtype=torch.bool)
    values = inputs.ratios.log_probs * inputs.token_advantages
    return Surrogate(values, inputs.ratios.token_log.detach(), clipped_low=never, clipped_high=never)

REINFORCE = Objective(name="reinforce", surrogate=reinforce, unit="token", clip_low=0.2, clip_high=0.2)
NOT_ONE = 3
"""


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_a_non_finite_log_prob_is_refused_naming_response_and_token(objective, value, which):
    arguments = list(make_case((3, 2, 4), spread=1e-4).arguments())
    arguments[which] = arguments[which].detach().clone()
    arguments[which][7] = value  # the third token of the third response
    with pytest.raises(
        NonFiniteLogProbError, match=r"token 2 \(from 0\) of response chain:5#1 is (nan|inf|-inf)"
    ) as caught:
        policy_loss(objective, *arguments, sequence_ids=["chain:1#0", "chain:5#0", "chain:5#1"])
    assert caught.value.quantity == ("log-prob", "old log-prob")[which]
    assert (caught.value.response, caught.value.token) == ("chain:5#1", 2)


def test_a_non_finite_log_prob_is_refused_even_where_the_advantage_is_zero():
    log_probs, old, advantages, cu_seqlens = make_case((3, 2), spread=1e-4).arguments()
    log_probs = log_probs.detach().clone()
    log_probs[0] = math.nan
    with pytest.raises(NonFiniteLogProbError, match=r"log-prob of token 0 .* of response 0 "):
        policy_loss("gspo", log_probs, old, torch.zeros_like(advantages), cu_seqlens)


def test_a_non_finite_advantage_is_refused_naming_the_response():
    log_probs, old, advantages, cu_seqlens = make_case((3, 2, 4), spread=1e-4).arguments()
    advantages[1] = math.nan
    with pytest.raises(NonFiniteLogProbError, match="the advantage of response b is nan"):
        policy_loss("gspo", log_probs, old, advantages, cu_seqlens, sequence_ids=["a", "b", "c"])


def test_the_first_of_several_is_named_after_a_response_without_tokens():
    log_probs = torch.tensor([0.0, math.nan, math.nan])
    with pytest.raises(NonFiniteLogProbError) as caught:
        policy_loss("grpo", log_probs, torch.zeros(3), torch.ones(3), torch.tensor([0, 1, 1, 3]))
    assert (caught.value.response, caught.value.token) == (2, 0)


@pytest.mark.parametrize("cu_seqlens", [[0, 3, 8], [1, 3, 9], [0, 10, 9]])
def test_segments_that_do_not_cover_the_tokens_are_refused(cu_seqlens):
    log_probs, old, _, _ = make_case((3, 6), spread=1e-4).arguments()
    with pytest.raises(AssertionError, match="cu_seqlens must rise from 0 to 9"):
        policy_loss("gspo", log_probs, old, torch.ones(2), torch.tensor(cu_seqlens))


def test_gspo_refuses_token_advantages_and_names_who_takes_them():
    case = make_case((3, 2), spread=1e-4, token_advantages=True)
    with pytest.raises(UserError, match=r"'gspo'.*one advantage a response.*5 for 2 responses.*gspo_token, grpo"):
        policy_loss("gspo", *case.arguments())


@pytest.mark.parametrize(
    ("given", "nearest"), [("gsop", "gspo"), ("gspo-token", "gspo_token"), ("GRPO", "grpo"), ("grop", "grpo")]
)
def test_a_misspelt_objective_is_answered_with_the_nearest_name(given, nearest):
    with pytest.raises(UserError, match=rf"objective\.name is '{given}' \(did you mean '{nearest}'\?\); accepted: gr"):
        resolve_objective(given)


def test_a_name_like_no_other_is_answered_with_the_accepted_ones():
    with pytest.raises(
        UserError, match=r"'ppo_clip_2'; accepted: grpo, gspo, gspo_token, or package\.module:attribute"
    ):
        resolve_objective("ppo_clip_2")


@pytest.fixture
def my_objectives(tmp_path, monkeypatch):
    (tmp_path / "my_objectives.py").write_text(MY_OBJECTIVES)
    (tmp_path / "broken_objectives.py").write_text("import a_package_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_objectives", None)


@pytest.mark.usefixtures("my_objectives")
def test_an_objective_of_ones_own_is_used_by_import_path():
    case = make_case((3, 2), spread=1e-4)
    output = policy_loss("my_objectives:REINFORCE", *case.arguments())
    output.loss.backward()
    expected = -torch.cat([case.advantages[:1].expand(3) / 3, case.advantages[1:].expand(2) / 2]) / 2
    torch.testing.assert_close(case.log_probs.grad, expected)
    assert float(output.metrics["clip/token_fraction"][0]) == 0


@pytest.mark.usefixtures("my_objectives")
@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("my_objective:REINFORCE", "there is no module 'my_objective'"),
        ("my_objectives.deeper:REINFORCE", "there is no module 'my_objectives.deeper'"),
        ("my_objectives:REINFORCED", r"did you mean 'REINFORCE'\?.*objectives in my_objectives: REINFORCE"),
        ("my_objectives:NOT_ONE", "is a int and not an Objective"),
        ("my_objectives:", "written package.module:attribute"),
        (":REINFORCE", "written package.module:attribute"),
        ("../evil:x", "written package.module:attribute"),
    ],
)
def test_an_import_path_that_leads_nowhere_is_refused_in_a_sentence(path, sentence):
    with pytest.raises(UserError, match=sentence):
        resolve_objective(path)


@pytest.mark.usefixtures("my_objectives")
def test_a_module_that_cannot_import_its_own_needs_keeps_its_traceback():
    with pytest.raises(ModuleNotFoundError, match="a_package_nobody_has"):
        resolve_objective("broken_objectives:ANY")


def test_importing_the_policy_loss_imports_neither_megatron_nor_transformers_nor_touches_cuda():
    code = (
        "import sys, torch, megatron_gspo.policy_loss\n"
        "heavy = {name.partition('.')[0] for name in sys.modules} & {'megatron', 'transformers', 'transformer_engine', 'apex'}\n"
        "assert not heavy, heavy\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not torch.distributed.is_initialized()\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
