"""Models and packed micro-batches small enough for tests, shared by unit and distributed tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_gspo.config import ModelSection
from megatron_gspo.types import MicroBatch

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,  # large enough that a wrong layout shows in every logit
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
}


def moe_config(**changes: Any) -> Qwen3MoeConfig:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
    return Qwen3MoeConfig(**_SIZES | experts | changes)


def dense_config(**changes: Any) -> Qwen3Config:
    return Qwen3Config(**_SIZES | changes)


def reference_model(config: Qwen3Config | Qwen3MoeConfig, seed: int = 0) -> PreTrainedModel:
    """Transformers' model with random weights, norms included."""
    torch.manual_seed(seed)
    model_class = Qwen3MoeForCausalLM if isinstance(config, Qwen3MoeConfig) else Qwen3ForCausalLM
    model = model_class(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(1 + 0.1 * torch.randn_like(weight))
    return model


def model_section(**changes: Any) -> ModelSection:
    return ModelSection(**{"path": Path("unused"), "dtype": "float32", "log_probs_chunk_tokens": 5} | changes)


def sequences(lengths: Sequence[int], vocabulary: int = 64, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (length,), generator=generator) for length in lengths]


def micro_batch(
    tokens: Sequence[torch.Tensor], prompt_tokens: int = 2, pad_to_multiple: int = 1, pad_segments_to_multiple: int = 1
) -> MicroBatch:
    """Pack `tokens`; all of a sequence after its first `prompt_tokens` is the response."""
    segments = [pad(sequence, (0, -len(sequence) % pad_segments_to_multiple)) for sequence in tokens]
    at_the_end = -sum(map(len, segments)) % pad_to_multiple
    segments += [torch.zeros(at_the_end, dtype=torch.long)] if at_the_end else []
    of_sample = [*map(len, tokens), 0][: len(segments)]
    is_sample_token = torch.cat(
        [torch.arange(len(segment)) < length for segment, length in zip(segments, of_sample, strict=True)]
    )
    ends = torch.tensor([len(segment) for segment in segments]).cumsum(0)
    starts = [0, *ends.tolist()[:-1]]
    predicting = [
        torch.arange(start + prompt_tokens - 1, start + len(sequence) - 1)
        for start, sequence in zip(starts, tokens, strict=False)
    ]
    packed = torch.cat(segments)
    positions = torch.cat(predicting)
    return MicroBatch(
        token_ids=packed,
        is_sample_token=is_sample_token,
        position_ids=torch.cat([torch.arange(len(segment)) for segment in segments]),
        segment_cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.long), ends]).int(),
        max_segment_tokens=max(map(len, segments)),
        predicting_positions=positions,
        target_token_ids=packed[positions + 1],
        response_cu_seqlens=torch.tensor([0, *map(len, predicting)]).cumsum(0),
        sample_indices=tuple(range(len(tokens))),
        advantages=torch.zeros(len(tokens)),
        behaviour_log_probs=torch.zeros(len(positions)),
        num_padding_tokens=int((~is_sample_token).sum()),
    )
