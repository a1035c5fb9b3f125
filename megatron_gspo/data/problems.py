"""What a problem is before it is tokenized, and what a source of problems offers to the streams over it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

Message = Mapping[str, str]
"""One turn of a chat: `role` and `content`."""


@dataclass(frozen=True)
class Problem:
    """One problem as its source states it."""

    id: str  # "train.jsonl:17" (the line, from 1), "arithmetic_chain:5" (the index, from 0)
    prompt: str | tuple[Message, ...]  # text, or a chat for the tokenizer's template
    answer: str
    reward: str  # a name in `reward.REWARDS`: what `reward.name: task` scores its responses with
    worked_answer: str | None = None  # a full solution to imitate, where the source has one written down
    row: Mapping[str, object] = field(default_factory=dict)  # the file's whole row, for rewards of one's own


class ProblemSource(Protocol):
    """Problems by index: the same index is always the same problem, so a cursor is one integer."""

    @property
    def name(self) -> str:
        """What metrics call it: a task's name, or a file's without its suffix."""

    @property
    def num_problems(self) -> int | None:
        """How many there are; None where they are generated without end."""

    def problem(self, index: int) -> Problem:
        """Problem `index`, from 0."""

    def demonstration(self, problem: Problem, rng: np.random.Generator, wrong_step_fraction: float) -> str:
        """A response to imitate in the cold start. A task makes that share of its steps wrong; a file has one text."""
