"""Built-in tasks: reproducible by index, held-out problems apart, demonstrations with a known share of mistakes."""

import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_gspo.config import BUILT_IN_TASKS, DataSection
from megatron_gspo.data.tasks import TASKS, ArithmeticChain, TaskProblem, TaskProblems, build_task, is_held_out
from megatron_gspo.types import UserError

CHAIN = ArithmeticChain(min_operations=1, max_operations=8, largest_operand=9)
WRITTEN_STEP = re.compile(r"([+\-*])(\d)(\d)")


def step_results(prompt: str) -> list[int]:
    """What each step comes to, by Python's own arithmetic on ever longer beginnings of the chain."""
    operations = re.findall(r"[+\-*]\d", prompt)
    expression, results = prompt[0], []
    for operation in operations:
        expression = f"({expression}){operation}"
        results.append(eval(expression) % 10)  # the test's own digits and operators
    return results


@given(seed=st.integers(0, 2**40), index=st.integers(0, 2**40))
def test_the_answer_is_the_last_digit_of_the_chain(seed: int, index: int) -> None:
    problem = TaskProblems(CHAIN, seed, "train").problem(index)

    assert isinstance(problem.prompt, str)
    assert problem.answer == str(step_results(problem.prompt)[-1])


def test_a_problem_depends_on_seed_and_index_alone() -> None:
    problems = TaskProblems(CHAIN, seed=7, split="train")
    forwards = [problems.problem(index) for index in range(50)]
    backwards = [TaskProblems(CHAIN, seed=7, split="train").problem(index) for index in reversed(range(50))]

    assert forwards == backwards[::-1]
    assert forwards != [TaskProblems(CHAIN, seed=8, split="train").problem(index) for index in range(50)]
    assert len({problem.id for problem in forwards}) == 50


def test_training_and_held_out_problems_never_meet() -> None:
    # Chains of one operation: 270 in all, so these draws are nearly exhaustive on both sides.
    shortest = ArithmeticChain(min_operations=1, max_operations=1, largest_operand=9)
    train, demonstrated, held_out = (
        {TaskProblems(shortest, seed, split).problem(index).prompt for seed in (1, 2) for index in range(600)}
        for split in ("train", "demonstration", "held_out")
    )

    assert not train & held_out
    assert not demonstrated & held_out
    assert len(train | held_out) > 250


def test_demonstrations_and_training_draw_different_problems() -> None:
    longest = ArithmeticChain(min_operations=8, max_operations=8, largest_operand=9)
    train, demonstrated = (
        {TaskProblems(longest, 1, split).problem(index).prompt for index in range(100)}
        for split in ("train", "demonstration")
    )

    assert not train & demonstrated


def test_the_number_of_operations_is_uniform() -> None:
    problems = TaskProblems(
        ArithmeticChain(min_operations=3, max_operations=6, largest_operand=3), seed=1, split="held_out"
    )
    lengths = [len(step_results(str(problems.problem(index).prompt))) for index in range(800)]

    counts = np.bincount(lengths, minlength=8)
    assert counts[:3].sum() == counts[7:].sum() == 0
    assert (np.abs(counts[3:7] - 200) < 5 * np.sqrt(200)).all()


def test_a_demonstration_without_mistakes_writes_every_step() -> None:
    assert CHAIN.demonstration("3+4-7*2=", np.random.default_rng(0), wrong_step_fraction=0.0) == "3+47-70*20"


def test_the_asked_share_of_steps_is_wrong_and_carried_on_from() -> None:
    rng = np.random.default_rng(0)
    problems = TaskProblems(
        ArithmeticChain(min_operations=8, max_operations=8, largest_operand=3), seed=1, split="demonstration"
    )
    num_wrong = 0
    for index in range(500):
        problem = problems.problem(index)
        result = int(str(problem.prompt)[0])
        steps = WRITTEN_STEP.findall(problems.demonstration(problem, rng, wrong_step_fraction=0.1))
        assert len(steps) == 8
        for symbol, operand, written in steps:
            num_wrong += int(written) != step_results(f"{result}{symbol}{operand}=")[0]
            result = int(written)

    assert num_wrong == pytest.approx(400, abs=5 * np.sqrt(4000 * 0.1 * 0.9))


def test_operands_are_uniform_up_to_the_largest() -> None:
    problems = TaskProblems(ArithmeticChain(min_operations=4, max_operations=4, largest_operand=3), 1, "train")
    operands = [int(digit) for index in range(300) for digit in str(problems.problem(index).prompt)[2::2]]

    counts = np.bincount(operands)
    assert len(counts) == 4
    assert counts[0] == 0
    assert (np.abs(counts[1:] - 400) < 5 * np.sqrt(400)).all()


def test_recipes_accept_the_names_of_all_tasks() -> None:
    assert set(BUILT_IN_TASKS) == set(TASKS)


def test_a_chain_without_a_possible_length_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.arithmetic_chain: min_operations 5 and max_operations 4"):
        ArithmeticChain(min_operations=5, max_operations=4, largest_operand=3)


class OneProblem:
    """A task of one's own, with a single problem."""

    name = "one"
    reward = "exact"

    def __init__(self, data: DataSection) -> None:
        self.prompt = data.train

    def draw(self, rng: np.random.Generator) -> TaskProblem:
        return TaskProblem(self.prompt, answer="1")

    def demonstration(self, prompt: str, rng: np.random.Generator, wrong_step_fraction: float) -> str:
        return "1"


def test_a_task_of_ones_own_is_found_by_import_path() -> None:
    task = build_task(f"{__name__}:OneProblem", DataSection(train="1="))

    assert TaskProblems(task, 1, "train").problem(3).prompt == "1="
    assert not is_held_out("1=")


def test_a_task_too_small_to_hold_problems_out_is_refused() -> None:
    with pytest.raises(UserError, match="none of 10000 problems drawn belongs to the held_out split"):
        TaskProblems(OneProblem(DataSection(train="1=")), 1, "held_out").problem(0)


@pytest.mark.parametrize(
    ("import_path", "said"),
    [("no_such_module:Task", "No module named 'no_such_module'"), (f"{__name__}:Nothing", "no attribute 'Nothing'")],
)
def test_an_import_path_that_leads_nowhere_is_refused(import_path: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_task(import_path, DataSection(train=import_path))


def test_tasks_are_imported_without_torch() -> None:
    program = "import sys, megatron_gspo.data.tasks; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
