"""A calculator beside the task `arithmetic_chain`: the policy writes `3+2?` and reads `5`, as the worked example.

A whole response to `3+2-1=`, with what the calculator wrote in brackets: `3+2?[5]-1?[4]=4`. It works out the operation
right before the `?`, modulo 10 as the task does. A `?` behind no operation is answered with `!` and costs its turn a
little; what is written before and after that turn is not blamed for it (`objective.name: gspo_token`).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable

from megatron_gspo.rollout.environments import Observation
from megatron_gspo.types import Prompt

NO_OPERATION = Observation("!", reward=-0.1)

_OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
# A digit may have been the calculator's own: the mark that asked for it stands before it.
_ASKED = re.compile(r"(\d)([+\-*])(\d)\?\Z")


class Calculator:
    """One response's calculator; see `environments.Environment`."""

    stop_texts = ("?",)

    def __init__(self) -> None:
        self._read = ""  # by the policy: what it wrote, and what it was answered

    def reset(self, prompt: Prompt) -> None:
        """Nothing to read before the first turn."""

    def step(self, turn_text: str) -> Observation:
        """The result of the operation that the turn ends with; the response is over where it asks for none."""
        self._read += turn_text
        if not turn_text.endswith("?"):
            return Observation(done=True)
        asked = _ASKED.search(self._read)
        if asked is None:
            answer = NO_OPERATION
        else:
            left, symbol, right = asked.groups()
            answer = Observation(str(_OPERATIONS[symbol](int(left), int(right)) % 10))
        self._read += answer.text
        return answer
