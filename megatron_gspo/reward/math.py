r"""The reward of mathematical problems: the final answer equals the right one, as math-verify sees it.

A response's final answer is its last `\boxed{…}`; or what follows `####` on its last line, as GSM8K writes it; or, in a
response that ended by itself, what math-verify finds: after words such as "the answer is", else the last formula or
number. A response cut off at the length limit was still under way to its last number, so that does not count.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from megatron_gspo.types import Prompt

# A boxed answer goes before anything else that looks like one, and the last box before earlier ones.
_EXTRACTION = (
    LatexExtractionConfig(
        boxed_match_priority=0,
        normalization_config=replace(LatexExtractionConfig().normalization_config, boxed="last"),
    ),
    ExprExtractionConfig(),
)

# It warns that its own time limit is off. Ours ends the process, which also stops what no signal handler can.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def math(prompt: Prompt, response_text: str, finished: bool) -> float:
    """1.0 if the response's final answer equals `prompt.answer`, else 0.0.

    Raises:
        ValueError: `prompt.answer` is nothing that math-verify can read, so that no response could ever be right.
    """
    right = _parse(prompt.answer if r"\boxed" in prompt.answer else _boxed(prompt.answer))
    if not right:
        raise ValueError(f"the right answer {prompt.answer!r} cannot be read as mathematics")
    final = _final_answer(response_text, finished)
    return float(final is not None and verify(right, _parse(final), timeout_seconds=None))


def _final_answer(response_text: str, finished: bool) -> str | None:
    """The part of the response to look for the answer in; None where it gives none."""
    _, box, boxed_answer = response_text.rpartition(r"\boxed")
    if box:
        return box + boxed_answer
    last_line = response_text.rstrip().rpartition("\n")[2]
    _, mark, marked_answer = last_line.rpartition("####")
    if mark:
        return _boxed(marked_answer)
    return response_text if finished else None


def _boxed(answer: str) -> str:
    return rf"\boxed{{{answer.strip().rstrip('.')}}}"


def _parse(text: str) -> list[object]:
    return list(parse(text, _EXTRACTION, parsing_timeout=None))
