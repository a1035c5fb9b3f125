"""What a decoding batch asks of the model, seen from the model's side."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from megatron_gspo.rollout.cpu_layers import use_cpu_layers
from megatron_gspo.rollout.decoding import decode
from megatron_gspo.types import SamplingSettings

PROMPTS = [(3, 4, 5, 6, 7), (8, 9)]
SETTINGS = SamplingSettings(max_response_tokens=30, stop_token_ids=(0, 1, 2), seed=1)


@pytest.fixture
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_a_prompt_is_read_once_and_finished_responses_are_not_decoded_to_the_end(model: PreTrainedModel) -> None:
    shapes = []
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
    sampled = decode(model, PROMPTS, [0] * 16 + [1] * 16, SETTINGS, torch.Generator().manual_seed(1))
    assert shapes[0] == (2, 5), "two prompts, padded to the longer one, for 32 responses"
    num_rows = [rows for rows, columns in shapes[1:] if columns == 1]
    assert num_rows == sorted(num_rows, reverse=True)
    assert len(num_rows) == max(len(tokens.token_ids) for tokens in sampled) - 1
    for step, rows in enumerate(num_rows):
        num_unfinished = sum(len(tokens.token_ids) > step + 1 for tokens in sampled)
        assert num_unfinished <= rows < num_unfinished * 8 / 7 + 1e-9


def test_the_cpu_layers_compute_what_transformers_own_do(model: PreTrainedModel) -> None:
    responses = [0] * 6 + [1] * 6
    own = decode(model, PROMPTS, responses, SETTINGS, torch.Generator().manual_seed(2))
    use_cpu_layers(model)
    replaced = decode(model, PROMPTS, responses, SETTINGS, torch.Generator().manual_seed(2))
    for left, right in zip(own, replaced, strict=True):
        assert left.token_ids.tolist() == right.token_ids.tolist()
        assert left.log_probs == pytest.approx(right.log_probs, abs=1e-5)
