"""Built-in verifiable tasks: problems generated on the fly from a seed, with answers that can be checked.

In: a task's name, a seed and an index. Out: that problem, the same every time, and for the cold start a demonstration of
solving it. Problem i depends on (seed, i) alone. Held-out problems are told from training problems by a hash of their
text, so the two never meet whatever the seeds.

`TASKS` maps names to what builds a `Task` from the recipe's `data` section; `package.module:attribute` names one's own.
"""

from __future__ import annotations

import hashlib
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, cast

import numpy as np

from megatron_gspo.config import DataSection
from megatron_gspo.data.problems import Problem
from megatron_gspo.import_path import import_attribute, is_import_path
from megatron_gspo.types import UserError

Split = Literal["train", "demonstration", "held_out"]
"""Which problems: demonstrations come from the training side, but are other draws than those that RL trains on."""

_RANDOM_STREAM: dict[Split, int] = {"train": 1, "demonstration": 2, "held_out": 3}
_HELD_OUT_SHARE = 8  # one text in this many is held out
_MAX_DRAWS = 10_000


@dataclass(frozen=True)
class TaskProblem:
    """What a task draws: the text that the policy reads, and the right answer."""

    prompt: str
    answer: str


class Task(Protocol):
    """A family of problems. Everything random comes from the generator that is passed in."""

    @property
    def name(self) -> str:
        """The task's name, in problem ids and metrics."""

    @property
    def reward(self) -> str:
        """The name in `reward.REWARDS` that scores responses."""

    def draw(self, rng: np.random.Generator) -> TaskProblem:
        """A random problem."""

    def demonstration(self, prompt: str, rng: np.random.Generator, wrong_step_fraction: float) -> str:
        """A response to `prompt` in which each step is wrong, and carried on from, with that probability."""


_OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_SYMBOLS = tuple(_OPERATIONS)


@dataclass(frozen=True)
class ArithmeticChain:
    """A running calculation mod 10, such as `3+2-1*4=`, done from left to right.

    The response repeats the first digit and then writes each operation with what it comes to, `3+25-14*46`: three
    characters an operation, and everything a step needs stands right before it. The answer is the last digit. The number
    of operations is uniform in [min_operations, max_operations], operands in [1, largest_operand]. With operands up to 9
    a tiny model stays long at guessing, since every result is then equally likely whatever one operand is.

    With `calculator` a demonstration asks for each result and says the last one itself: `3+2?5-1?4*4?6=6`.
    """

    min_operations: int
    max_operations: int
    largest_operand: int
    calculator: bool = False
    name: ClassVar[str] = "arithmetic_chain"
    reward: ClassVar[str] = "last_digit"

    def __post_init__(self) -> None:
        if not 1 <= self.min_operations <= self.max_operations:
            raise UserError(
                f"data.arithmetic_chain: min_operations {self.min_operations} and max_operations {self.max_operations} "
                "were given; 1 <= min_operations <= max_operations is accepted"
            )
        assert 1 <= self.largest_operand <= 9, "an operand is a digit"

    def draw(self, rng: np.random.Generator) -> TaskProblem:
        """A first digit, then operations and operands, each uniform."""
        num_operations = int(rng.integers(self.min_operations, self.max_operations + 1))
        first = rng.integers(0, 10)
        operands = rng.integers(1, self.largest_operand + 1, size=num_operations)
        symbols = [_SYMBOLS[choice] for choice in rng.integers(0, len(_SYMBOLS), size=num_operations)]
        prompt = f"{first}" + "".join(f"{s}{d}" for s, d in zip(symbols, operands, strict=True)) + "="
        return TaskProblem(prompt, answer=self.demonstration(prompt, rng, wrong_step_fraction=0.0)[-1])

    def demonstration(self, prompt: str, rng: np.random.Generator, wrong_step_fraction: float) -> str:
        """Every step written out. A wrong step's digit is one of the nine others; later steps go on from it."""
        result = int(prompt[0])
        written = [prompt[0]]
        for symbol, operand in re.findall(r"([+\-*])(\d)", prompt):
            result = _OPERATIONS[symbol](result, int(operand)) % 10
            is_wrong = rng.random() < wrong_step_fraction
            if is_wrong:
                result = (result + int(rng.integers(1, 10))) % 10
            asked = "?" if self.calculator and not is_wrong else ""
            written.append(f"{symbol}{operand}{asked}{result}")
        return "".join(written) + (f"={result}" if self.calculator else "")


TASKS: dict[str, Callable[[DataSection], Task]] = {
    "arithmetic_chain": lambda data: ArithmeticChain(**data.arithmetic_chain.model_dump()),
}


def is_task_name(name: str) -> bool:
    """Whether `name` is a built-in task's, or has the form of an import path to one."""
    return name in TASKS or is_import_path(name)


def build_task(name: str, data: DataSection) -> Task:
    """The task that `name` stands for: in `TASKS`, or `package.module:attribute`, called with the `data` section.

    Raises:
        UserError: the import path leads nowhere, or to something that cannot be called.
    """
    if name in TASKS:
        return TASKS[name](data)
    factory = import_attribute(name)
    if not callable(factory):
        raise UserError(f"{name!r} is not a task: a callable that takes the recipe's data section is accepted")
    try:
        task = factory(data)
    except Exception as error:  # it is the user's: it may fail in any way
        raise UserError(f"{name!r} makes no task: {type(error).__name__}: {error}") from error
    missing = [part for part in ("name", "reward", "draw", "demonstration") if not hasattr(task, part)]
    if missing:
        raise UserError(f"{name!r} makes a {type(task).__name__}, which is no task: it has no {', '.join(missing)}")
    return cast(Task, task)


def is_held_out(prompt: str) -> bool:
    """Whether a problem with this text is kept for evaluation; one text in eight is."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % _HELD_OUT_SHARE == 0


@dataclass(frozen=True)
class TaskProblems:
    """A task's problems by index: a `ProblemSource` without end."""

    task: Task
    seed: int
    split: Split

    @property
    def num_problems(self) -> None:
        """Without end."""
        return None

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name

    def problem(self, index: int) -> Problem:
        """Problem `index` of this seed and split.

        Raises:
            UserError: the task has too few different problems for some to be held out.
        """
        rng = np.random.default_rng([_RANDOM_STREAM[self.split], self.seed, index])
        for _ in range(_MAX_DRAWS):
            drawn = self.task.draw(rng)
            if is_held_out(drawn.prompt) == (self.split == "held_out"):
                label = self.name if self.split == "train" else f"{self.name}/{self.split}"
                return Problem(f"{label}:{index}", drawn.prompt, drawn.answer, self.task.reward)
        raise UserError(
            f"{self.name}: none of {_MAX_DRAWS} problems drawn belongs to the {self.split} split; "
            "a task needs more different problems than that"
        )

    def demonstration(self, problem: Problem, rng: np.random.Generator, wrong_step_fraction: float) -> str:
        """The task's demonstration for one of its problems."""
        assert isinstance(problem.prompt, str), "a task's prompt is text"
        return self.task.demonstration(problem.prompt, rng, wrong_step_fraction)
