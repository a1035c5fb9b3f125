"""What answers the policy in the middle of its response: the protocol of multi-turn episodes, and where to find one.

In: a name, or the import path of an environment of one's own. Out: what makes one environment a response. No text is
turned into tokens here, and no engine is asked: that is `multi_turn`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

from megatron_gspo.import_path import find_import_path, import_attribute
from megatron_gspo.types import Prompt, UserError


@dataclass(frozen=True)
class Observation:
    """What an environment answers to a turn."""

    text: str = ""  # what the policy reads before its next turn; never learned from. Left out where `done`
    reward: float = (
        0.0  # for the turn it answers; the recipe's reward of the whole response is added to the last turn's
    )
    done: bool = False  # the response is over


class Environment(Protocol):
    """One response's surroundings, made anew for each. Those of a step are asked at the same time, each in a thread.

    What it raises ends its response, which is then unfinished, and is counted (`rollout/num_environment_failures`). Its
    own work is for it to bound in time.
    """

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """What ends a turn beside the end-of-sequence token; each must be one token of the tokenizer."""

    def reset(self, prompt: Prompt) -> Observation | None:
        """Begin. The text of what is returned follows the prompt before the first turn; None for nothing."""

    def step(self, turn_text: str) -> Observation:
        """Answer a turn that ended by itself, given without special tokens but with its stop text."""


EnvironmentFactory = Callable[[], Environment]

ENVIRONMENTS: dict[str, str] = {"calculator": "megatron_gspo.rollout.calculator:Calculator"}
"""Name -> import path of what makes an environment."""


def environment_import_path(name: str) -> str:
    """The import path that `name` stands for: in `ENVIRONMENTS`, or `package.module:attribute` itself.

    Raises:
        UserError: it is neither.
    """
    own = "package.module:attribute of an environment of one's own"
    return find_import_path("environment.name", name, ENVIRONMENTS, own)


def find_environment(name: str) -> EnvironmentFactory:
    """What makes environments of this name, without arguments; one is made to see that it works.

    Raises:
        UserError: there is none, or what it makes is no `Environment`.
    """
    factory = import_attribute(environment_import_path(name))
    if not callable(factory):
        raise UserError(f"environment.name: {name!r} cannot be called; accepted: what makes an environment")
    try:
        made = factory()
    except Exception as error:  # it is the user's: it may fail in any way
        raise UserError(f"environment.name: {name!r} makes no environment: {type(error).__name__}: {error}") from error
    missing = [part for part in ("stop_texts", "reset", "step") if not hasattr(made, part)]
    if missing:
        raise UserError(
            f"environment.name: {name!r} makes a {type(made).__name__}, which is no environment: it has no "
            f"{', '.join(missing)}"
        )
    return cast(EnvironmentFactory, factory)
