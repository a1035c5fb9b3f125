"""Models and packed micro-batches that the rows measure with: Qwen3-MoE layers that a machine without a GPU can run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from megatron_gspo import parallel
from megatron_gspo.config import ModelSection, ParallelSection
from megatron_gspo.data.tokenizer import build_byte_tokenizer
from megatron_gspo.model.build import build_policy
from megatron_gspo.model.hf_weights import initialize_weights
from megatron_gspo.model.policy import PolicyModel
from megatron_gspo.types import Sample

SHIPPED = Path(__file__).resolve().parents[2] / "recipes/models/tiny_qwen3_moe"


def config(**changes: Any) -> Qwen3MoeConfig:
    """Qwen3-30B-A3B's routing, 128 experts of which 8 a token, in small layers."""
    shapes: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 96,
        "norm_topk_prob": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    return Qwen3MoeConfig(**(shapes | changes))


def policy(shapes: Qwen3MoeConfig, **options: Any) -> PolicyModel:
    """A policy with random weights, on one rank."""
    parallel.initialize_distributed()
    parallel.initialize_model_parallel(ParallelSection(), seed=1)
    section = ModelSection(**{"path": Path(), "dtype": "float32"} | options)
    (model,) = build_policy(shapes, section, ParallelSection())
    initialize_weights([model], seed=1, initializer_range=0.02)
    return model


def write_checkpoint(directory: Path, *, mean_response_tokens: float | None = None, **changes: Any) -> None:
    """A Hugging Face checkpoint of the shapes that the laptop recipes train, with random weights and its tokenizer.

    With `mean_response_tokens` it ends a response after every token with about the same probability, so that lengths
    are geometrically distributed; without, it does so as rarely as it samples any other token.
    """
    tokenizer = build_byte_tokenizer()
    tokenizer.save_pretrained(directory)
    shapes = AutoConfig.from_pretrained(SHIPPED)
    for name, value in changes.items():
        setattr(shapes, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shapes, dtype=torch.float32)
    if mean_response_tokens is not None:
        _end_after(model, tokenizer.eos_token_id, mean_response_tokens)
    model.save_pretrained(directory)


@torch.no_grad()
def _end_after(model: PreTrainedModel, eos_token_id: int, mean_tokens: float) -> None:
    """Give the end of sequence the logit with which one token in `mean_tokens` is one."""
    # All tokens get a direction in common, which the last norm makes one length; along it lies the end's logit.
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    shared = torch.zeros(embeddings.shape[1])
    shared[0] = 8 * embeddings.norm(dim=-1).mean()
    embeddings += shared
    ids = torch.randint(len(head), (16, 64))
    hidden = model.base_model(ids).last_hidden_state.flatten(0, 1)
    others = (hidden @ head.T).logsumexp(-1).mean()
    head[eos_token_id] = 0
    head[eos_token_id, 0] = (others - math.log(mean_tokens - 1)) / hidden[:, 0].mean()


def samples(lengths: Sequence[int], prompt_tokens: int = 16, vocabulary: int = 512, seed: int = 0) -> list[Sample]:
    """Random samples of `lengths` tokens, prompt and response together."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, vocabulary, length) for length in lengths]
    return [
        Sample(index, row[:prompt_tokens], row[prompt_tokens:], 1.0, np.zeros(len(row) - prompt_tokens, np.float32))
        for index, row in enumerate(rows)
    ]
