"""The reward of the built-in tasks: the last result written is the right one, and the response ended by itself."""

from __future__ import annotations

from megatron_gspo.types import Prompt


def exact(prompt: Prompt, response_text: str, finished: bool) -> float:
    """1.0 if the response has ended and what follows its last `=` (all of it, where there is none) is the answer."""
    return float(finished and response_text.rpartition("=")[2].strip() == prompt.answer)
