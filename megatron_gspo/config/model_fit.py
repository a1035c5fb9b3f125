"""What must hold between a recipe and the model it names, by the rules of Megatron-Core 0.16.1.

In: the `config.json` of the checkpoint directory `model.path`. Out: what is refused, nothing where all fits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_gspo.config.layout_fit import layout_refusals
from megatron_gspo.config.refusal import Refusal, describe, not_accepted
from megatron_gspo.config.schema import Recipe

MODEL_TYPES = ("qwen3_moe", "qwen3")
SHAPES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
MOE_SHAPES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")


def check_model(recipe: Recipe) -> list[Refusal]:
    """What is wrong between the recipe and the `config.json` of the model it names; that it cannot be read, to begin with."""
    file = recipe.model.path / "config.json"
    accepted = "a Hugging Face checkpoint directory, or one with a config.json and a tokenizer alone"
    try:
        hf_config = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return [Refusal("model.path", f"is {recipe.model.path}, which holds no config.json; accepted: {accepted}")]
    except (OSError, ValueError) as error:
        return [Refusal("model.path", f"holds a config.json that cannot be read ({error}); accepted: {accepted}")]
    if not isinstance(hf_config, dict):
        return [Refusal("model.path", f"holds a config.json of {describe(hf_config)}; accepted: {accepted}")]
    return check_recipe_against_model(recipe, hf_config)


def check_recipe_against_model(recipe: Recipe, hf_config: Mapping[str, Any]) -> list[Refusal]:
    """What is wrong between the recipe and the model's `config.json`, by the rules of Megatron-Core 0.16.1."""
    model_type = hf_config.get("model_type")
    if model_type not in MODEL_TYPES:
        accepted = " or ".join(MODEL_TYPES)
        return [Refusal("model.path", f"holds a model of model_type {describe(model_type)}; accepted: {accepted}")]
    # Transformers 5 writes the number of experts under another name than the checkpoints it reads.
    shapes = {"num_experts": hf_config.get("num_local_experts"), **hf_config}
    names = SHAPES if model_type == "qwen3" else SHAPES + MOE_SHAPES
    broken = [name for name in names if not _is_count(shapes.get(name))]
    if broken:
        given = ", ".join(f"{name} is {describe(shapes.get(name))}" for name in broken)
        return [Refusal("model.path", f"holds a config.json whose {given}; accepted: whole numbers of at least 1")]
    checks = (_check_attention, _check_dense if model_type == "qwen3" else _check_experts)
    return [
        *layout_refusals(recipe.model, recipe.parallel, shapes),
        *(refusal for check in checks for refusal in check(recipe, shapes)),
    ]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_attention(recipe: Recipe, shapes: Mapping[str, Any]) -> Iterator[Refusal]:
    heads, groups = shapes["num_attention_heads"], shapes["num_key_value_heads"]
    if heads % groups:
        yield Refusal(
            "model.path", f"holds a config.json with {heads} num_attention_heads; accepted: a multiple of {groups}"
        )
    multi_turn = recipe.environment.name is not None
    if recipe.max_sequence_tokens > shapes["max_position_embeddings"]:
        yield not_accepted(
            "rollout.max_response_tokens",
            recipe.rollout.max_response_tokens,
            f"together with rollout.max_prompt_tokens ({recipe.rollout.max_prompt_tokens}) at most the model's "
            f"max_position_embeddings ({shapes['max_position_embeddings']})"
            + (
                f"; environment.max_turns ({recipe.environment.max_turns}) times it and "
                f"environment.max_observation_tokens ({recipe.environment.max_observation_tokens})"
                if multi_turn
                else ""
            ),
        )


def _check_experts(recipe: Recipe, shapes: Mapping[str, Any]) -> Iterator[Refusal]:
    del recipe
    experts, active = shapes["num_experts"], shapes["num_experts_per_tok"]
    if active > experts:
        yield Refusal(
            "model.path", f"holds a config.json with {active} num_experts_per_tok; accepted: at most {experts}"
        )


def _check_dense(recipe: Recipe, shapes: Mapping[str, Any]) -> Iterator[Refusal]:
    del shapes
    if recipe.routing.replay != "off":
        because = "for a dense model (model_type qwen3), which has no experts"
        yield not_accepted("routing.replay", recipe.routing.replay, f"off {because}")
