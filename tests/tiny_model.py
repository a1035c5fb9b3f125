"""A Qwen3-MoE checkpoint directory small enough to build in every test: shapes and tokenizer, no weights."""

from pathlib import Path
from typing import Any

from transformers import Qwen3MoeConfig

from megatron_gspo.data.tokenizer import build_byte_tokenizer


def write_tiny_model(path: Path, **changes: Any) -> Path:
    """Write the configuration, with `changes`, and the byte-level tokenizer; returns `path`."""
    shapes = {
        "vocab_size": 272,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "initializer_range": 0.1,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    Qwen3MoeConfig(**(shapes | changes)).save_pretrained(path)
    build_byte_tokenizer().save_pretrained(path)
    return path


def tiny_recipe(model: Path, **sections: dict[str, Any]) -> str:
    """A recipe, as YAML text, that trains the model in `model` for two quick steps; `sections` are merged into it."""
    import yaml

    recipe: dict[str, dict[str, Any]] = {
        "model": {"path": str(model), "dtype": "float32"},
        "data": {
            "train": "arithmetic_chain",
            "eval": "arithmetic_chain",
            "arithmetic_chain": {"min_operations": 1, "max_operations": 2},
        },
        "rollout": {"responses_per_prompt": 4, "max_response_tokens": 12},
        "training": {
            "steps": 2,
            "prompts_per_step": 4,
            "mini_batches": 2,
            "tokens_per_micro_batch": 128,
            "learning_rate": 0.001,
        },
        "evaluation": {"prompts": 4, "samples_per_prompt": 2},
        "warmstart": {"steps": 3, "sequences_per_step": 8},
        "logging": {"tensorboard": False},
    }
    for name, fields in sections.items():
        recipe[name] = recipe.get(name, {}) | fields
    return yaml.safe_dump(recipe)
