"""What rewards there are, and what a reward is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from megatron_gspo.import_path import find_import_path
from megatron_gspo.types import Prompt


@dataclass(frozen=True)
class ScoringItem:
    """One response to score."""

    prompt: Prompt
    response_text: str  # without special tokens
    finished: bool  # it ended by itself: its finish reason is "stop"


class RewardFunction(Protocol):
    """A reward: any number, in [0, 1] as the paper has it. What it raises is counted, and scores 0."""

    def __call__(self, prompt: Prompt, response_text: str, finished: bool) -> float:
        """Score one response."""


REWARDS: dict[str, str] = {
    "exact": "megatron_gspo.reward.exact:exact",
    "last_digit": "megatron_gspo.reward.exact:last_digit",
    "math": "megatron_gspo.reward.math:math",
}
"""Name -> import path. Paths, because only the worker process imports what `math` needs."""

BY_PROBLEM = "task"
"""The reward's name that asks each problem: a built-in task names its own, a file's problems name `math`."""


def reward_import_path(name: str) -> str:
    """The import path that `name` stands for: in `REWARDS`, or `package.module:function` itself.

    Raises:
        UserError: it is neither.
    """
    own = "package.module:function of a reward of one's own"
    return find_import_path("reward.name", name, REWARDS, own, also=(BY_PROBLEM,))
