"""An environment that random weights get to talk to: many characters end a turn, and every answer says how long it was."""

from __future__ import annotations

from megatron_gspo.rollout.environments import Observation
from megatron_gspo.types import Prompt

ENDS_A_TURN = tuple(chr(code) for code in range(ord("!"), ord("~"), 3))


class Talkative:
    """Begins with `[go]` and answers `[n]` to a turn of n characters, for 0.25 each."""

    stop_texts = ENDS_A_TURN

    def reset(self, prompt: Prompt) -> Observation:
        return Observation("[go]")

    def step(self, turn_text: str) -> Observation:
        if turn_text[-1:] not in ENDS_A_TURN:
            return Observation(reward=0.25, done=True)
        return Observation(f"[{len(turn_text)}]", reward=0.25)
