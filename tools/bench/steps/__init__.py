"""Whole RL steps, each system in a process of its own that makes one step whenever it is told to (`turns.py`)."""

from __future__ import annotations

from dataclasses import dataclass

PROMPTS, RESPONSES_PER_PROMPT, MINI_BATCHES = 32, 8, 4  # a step
LEARNING_RATE = 1e-4
ADAM_BETAS = (0.9, 0.999)
CLIP_LOW, CLIP_HIGH = 3e-4, 4e-4
PROBLEMS = tuple(f"{number % 10}+{number // 10 % 10}*3-7=" for number in range(64))  # 8 tokens each
PROBE = tuple(range(40, 72))  # token ids whose log-probs both systems report before their first step


@dataclass(frozen=True)
class FixedSample:
    """A response that both systems learn from before their first step, so that their updates can be compared."""

    prompt: tuple[int, ...]  # token ids
    response: tuple[int, ...]  # token ids
    advantage: float
    shifts: tuple[float, ...]  # [response] what old log-probs have beyond the policy's own: a ratio is exp(-their mean)


def _fixed_sample(number: int) -> FixedSample:
    """Lengths and tokens differ; both signs of advantage meet ratios on both sides of both clips.

    Along a response the shifts rise, so that ratios of tokens are others than that of the response.
    """
    length = 4 + number
    mean = (-1e-3, -1e-4, 1e-4, 1e-3)[number // 2 % 4]
    return FixedSample(
        prompt=tuple((31 * number + 7 * place) % 256 for place in range(8)),
        response=tuple((17 * number + 5 * place * place + 3) % 256 for place in range(length)),
        advantage=(1 + number / 16) * (1 if number % 2 else -0.5),
        shifts=tuple(mean + 2e-3 * (2 * place / (length - 1) - 1) for place in range(length)),
    )


FIXED = tuple(_fixed_sample(number) for number in range(16))


def score(text: str) -> float:
    """A reward that random weights earn in part: the share of characters with an odd code."""
    return sum(ord(character) % 2 for character in text) / max(1, len(text))


def reward(prompt: object, response_text: str, finished: bool) -> float:
    """`score` as this project asks for it. Here, because the process that scores imports this module and little else.

    The rewards that this project computes in its own process are 0 for nearly all that random weights write. What its
    processes for others take is counted (`processes.py`).
    """
    del prompt, finished
    return score(response_text)
