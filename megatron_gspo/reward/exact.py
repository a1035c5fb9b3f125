"""The rewards of the built-in tasks: the response ended by itself, and its last result is the right one.

Plain comparisons of text, which can neither hang nor raise: they run in the trainer's own process.
"""

from __future__ import annotations

from megatron_gspo.types import Prompt


def exact(prompt: Prompt, response_text: str, finished: bool) -> float:
    """1.0 if the response has ended and what follows its last `=` (all of it, where there is none) is the answer."""
    return float(finished and response_text.rpartition("=")[2].strip() == prompt.answer)


def last_digit(prompt: Prompt, response_text: str, finished: bool) -> float:
    """1.0 if the response has ended and its last character is the answer, a digit."""
    return float(finished and response_text[-1:] == prompt.answer)
