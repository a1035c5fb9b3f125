"""From one step's logits to the next tokens and their behaviour log-probs."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_gspo.types import SamplingSettings, TrainingFailedError

# Keeps uniform x total strictly below total, whatever rounding does, so that no choice falls beyond the last token.
_BELOW_ONE = 1 - 2**-52


def draw_uniforms(num_responses: int, settings: SamplingSettings, generator: torch.Generator) -> Tensor:
    """[num_responses, max_response_tokens] float64 in [0, 1): what decides each token of each response.

    Drawn ahead, a response's tokens depend on its place in the call and the seed only, not on which other responses
    share its batch or have left it.
    """
    return (
        torch.rand(num_responses, settings.max_response_tokens, dtype=torch.float64, generator=generator) * _BELOW_ONE
    )


def choose_tokens(logits: Tensor, uniform: Tensor, settings: SamplingSettings) -> tuple[Tensor, Tensor]:
    """Sample one token a row.

    Args:
        logits: [rows, V], any floating dtype.
        uniform: [rows] float64 in [0, 1), from `draw_uniforms`.

    Returns:
        Tokens [rows] int64, and their log-probs [rows] float32 at the temperature (at 1 for temperature 0), over the
        whole vocabulary whatever top-p and top-k leave of it.
    """
    greedy = settings.temperature == 0
    log_probs = (logits.float() if greedy else logits.float() / settings.temperature).log_softmax(dim=-1)
    if not bool(torch.isfinite(log_probs.amax(dim=-1)).all()):
        raise TrainingFailedError(
            "the policy's logits are not finite while sampling: its weights are, or what it computes overflows"
        )
    tokens = log_probs.argmax(dim=-1) if greedy else _inverse_cumulative(log_probs.exp(), uniform, settings)
    return tokens, log_probs.gather(1, tokens[:, None]).squeeze(1)


def _inverse_cumulative(probabilities: Tensor, uniform: Tensor, settings: SamplingSettings) -> Tensor:
    """The token at which the cumulative probability of the permitted tokens passes `uniform` of their total.

    Top-k and top-p both cut the full distribution, as SGLang applies them: a token stays when fewer than k are likelier
    and those hold less than p together.
    """
    candidates = None
    if settings.top_k > 0:
        probabilities, candidates = probabilities.topk(min(settings.top_k, probabilities.shape[1]), dim=1)
    elif settings.top_p < 1:
        probabilities, candidates = probabilities.sort(dim=1, descending=True)
    if settings.top_p < 1:
        likelier = probabilities.cumsum(dim=1) - probabilities
        probabilities = probabilities.where(likelier < settings.top_p, 0)
    cumulative = probabilities.cumsum(dim=1, dtype=torch.float64)
    # `right` skips tokens of probability 0: they do not raise the cumulative probability above the one before.
    choice = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return (choice if candidates is None else candidates.gather(1, choice)).squeeze(1)
