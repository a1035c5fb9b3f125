"""Models and packed micro-batches that the rows measure with: Qwen3-MoE layers that a machine without a GPU can run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig

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


def write_checkpoint(directory: Path, **changes: Any) -> None:
    """A Hugging Face checkpoint of the shapes that the laptop recipes train, with random weights and its tokenizer."""
    build_byte_tokenizer().save_pretrained(directory)
    shapes = AutoConfig.from_pretrained(SHIPPED)
    for name, value in changes.items():
        setattr(shapes, name, value)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shapes, dtype=torch.float32).save_pretrained(directory)


def samples(lengths: Sequence[int], prompt_tokens: int = 16, vocabulary: int = 512, seed: int = 0) -> list[Sample]:
    """Random samples of `lengths` tokens, prompt and response together."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, vocabulary, length) for length in lengths]
    return [
        Sample(index, row[:prompt_tokens], row[prompt_tokens:], 1.0, np.zeros(len(row) - prompt_tokens, np.float32))
        for index, row in enumerate(rows)
    ]
