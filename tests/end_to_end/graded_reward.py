"""A reward that a policy with random weights earns in part: something to learn from in every group."""

from megatron_gspo.types import Prompt


def share_of_odd_characters(prompt: Prompt, response_text: str, finished: bool) -> float:
    """The share of the response's characters with an odd code."""
    return sum(ord(character) % 2 for character in response_text) / max(1, len(response_text))
