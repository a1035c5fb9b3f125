"""One step's choice of tokens, where the distribution is known."""

from __future__ import annotations

import pytest
import torch

from megatron_gspo.rollout.sampling import choose_tokens, draw_uniforms
from megatron_gspo.types import SamplingSettings

PROBABILITIES = torch.tensor([0.05, 0.4, 0.0, 0.25, 0.3])
NUM_DRAWS = 200_000


def frequencies(settings: SamplingSettings) -> torch.Tensor:
    """Share of draws that chose each token."""
    uniform = draw_uniforms(NUM_DRAWS, settings, torch.Generator().manual_seed(0))[:, 0]
    tokens, _ = choose_tokens(PROBABILITIES.log().expand(NUM_DRAWS, -1), uniform, settings)
    return torch.bincount(tokens, minlength=len(PROBABILITIES)) / NUM_DRAWS


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param({}, [0.05, 0.4, 0.0, 0.25, 0.3], id="unrestricted"),
        pytest.param({"top_k": 2}, [0, 4 / 7, 0, 0, 3 / 7], id="top-k"),
        pytest.param(
            {"top_p": 0.71}, [0, 0.4 / 0.95, 0, 0.25 / 0.95, 0.3 / 0.95], id="top-p keeps the one that passes p"
        ),
        pytest.param({"top_p": 0.69}, [0, 4 / 7, 0, 0, 3 / 7], id="top-p"),
        pytest.param({"top_k": 3, "top_p": 0.39}, [0, 1, 0, 0, 0], id="both"),
        pytest.param({"top_k": 99}, [0.05, 0.4, 0.0, 0.25, 0.3], id="top-k beyond the vocabulary"),
    ],
)
def test_tokens_are_chosen_as_often_as_they_are_likely(settings: dict[str, float], expected: list[float]) -> None:
    actual = frequencies(SamplingSettings(max_response_tokens=1, **settings))  # type: ignore[arg-type]
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), atol=0.005, rtol=0)
    assert not actual[torch.tensor(expected) == 0].any(), "what is impossible never happens"


def test_temperature_divides_the_logits() -> None:
    actual = frequencies(SamplingSettings(max_response_tokens=1, temperature=0.5))
    squared = PROBABILITIES.square()
    torch.testing.assert_close(actual, squared / squared.sum(), atol=0.005, rtol=0)


@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"top_p": 0.5}])
def test_the_largest_uniform_still_chooses_a_possible_token(settings: dict[str, float]) -> None:
    """The end of the interval, where rounding could step over the last token; token 5 is impossible."""
    logits = torch.cat([PROBABILITIES, torch.zeros(1)]).log()[None]
    largest = torch.tensor([1 - 2**-53], dtype=torch.float64) * (1 - 2**-52)
    sampling = SamplingSettings(max_response_tokens=1, **settings)  # type: ignore[arg-type]
    tokens, log_probs = choose_tokens(logits, largest, sampling)
    assert int(tokens) < 5
    assert log_probs.isfinite().all()


def test_a_response_keeps_its_uniforms_however_responses_are_divided_into_batches() -> None:
    settings = SamplingSettings(max_response_tokens=7)
    generator = torch.Generator().manual_seed(3)
    whole = draw_uniforms(9, settings, torch.Generator().manual_seed(3))
    parts = [draw_uniforms(size, settings, generator) for size in (1, 5, 3)]
    assert torch.equal(torch.cat(parts), whole)
