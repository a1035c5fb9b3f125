"""Whole RL steps, each system in a process of its own that makes one step whenever it is told to (`turns.py`)."""

PROMPTS, RESPONSES_PER_PROMPT, MINI_BATCHES = 32, 8, 4  # a step
LEARNING_RATE = 1e-4
CLIP_LOW, CLIP_HIGH = 3e-4, 4e-4
PROBLEMS = tuple(f"{number % 10}+{number // 10 % 10}*3-7=" for number in range(64))  # 8 tokens each
PROBE = tuple(range(40, 72))  # token ids whose log-probs both systems report before their first step


def score(text: str) -> float:
    """A reward that random weights earn in part: the share of characters with an odd code."""
    return sum(ord(character) % 2 for character in text) / max(1, len(text))


def reward(prompt: object, response_text: str, finished: bool) -> float:
    """`score` as this project asks for it. Here, because the process that scores imports this module and little else."""
    del prompt, finished
    return score(response_text)
