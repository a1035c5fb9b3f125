"""A recipe is held against the shapes of the model it names before anything is built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_gspo.config import Recipe

Write = Callable[..., Path]
Load = Callable[..., Recipe]
Refuse = Callable[..., str]
DENSE = {"model_type": "qwen3", "num_experts": None, "num_experts_per_tok": None, "moe_intermediate_size": None}


@pytest.mark.parametrize(
    ("overrides", "shapes", "told"),
    [
        (["parallel.tensor=3"], {}, ["parallel.tensor is 3", "num_attention_heads (8)"]),
        (
            ["parallel.tensor=4"],
            {"num_key_value_heads": 6, "num_attention_heads": 24, "vocab_size": 24},
            ["parallel.tensor is 4", "a divisor or a multiple of the model's num_key_value_heads (6)"],
        ),
        (
            ["parallel.tensor=2"],
            {"vocab_size": 97},
            ["parallel.tensor is 2", "a divisor of the model's vocab_size (97)"],
        ),
        (
            ["parallel.tensor=4", "parallel.expert_tensor=1"],
            {"mlp_only_layers": [0], "intermediate_size": 50},
            ["parallel.tensor is 4", "a divisor of the model's intermediate_size (50)"],
        ),
        (["parallel.pipeline=3"], {}, ["parallel.pipeline is 3", "num_hidden_layers (8): 1, 2, 4, 8"]),
        (
            ["parallel.pipeline=2", "parallel.virtual_pipeline=3"],
            {},
            ["parallel.virtual_pipeline is 3", "a divisor of a pipeline rank's 4 layers: 1, 2, 4"],
        ),
        (["parallel.expert=3", "training.mini_batches=1", "training.prompts_per_step=3"], {}, ["num_experts (16)"]),
        (
            ["parallel.expert_tensor=16", "training.mini_batches=1"],
            {},
            ["parallel.expert_tensor is 16", "moe_intermediate_size (24)"],
        ),
        (
            ["parallel.expert_tensor=4", "model.spec=local", "training.mini_batches=1"],
            {},
            ["parallel.expert_tensor is 4", "a multiple of 8 in bfloat16", "moe_intermediate_size (24)"],
        ),
        (
            ["rollout.max_response_tokens=4000"],
            {},
            ["rollout.max_response_tokens is 4000", "max_prompt_tokens (1024)", "max_position_embeddings (4096)"],
        ),
        (
            ["environment.name=calculator", "environment.max_turns=3", "rollout.max_response_tokens=1000"],
            {},
            [
                "rollout.max_response_tokens is 1000",
                "environment.max_turns (3) times it",
                "max_observation_tokens (256)",
            ],
        ),
        (["parallel.expert=2"], DENSE, ["parallel.expert is 2", "1 for a dense model"]),
        (["parallel.expert_tensor=1"], DENSE, ["parallel.expert_tensor is 1", "null for a dense model"]),
        (["routing.replay=r2"], DENSE, ["routing.replay is the text 'r2'", "off for a dense model"]),
        (["routing.replay=r3"], DENSE, ["routing.replay is the text 'r3'", "off for a dense model"]),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    recipe_file: Write, refusal: Refuse, model: Write, overrides: list[str], shapes: dict[str, object], told: list[str]
) -> None:
    model(**shapes)
    message = refusal(recipe_file(), overrides)
    assert message.startswith("command line: ")
    assert all(part in message for part in told), message


@pytest.mark.parametrize(
    ("overrides", "shapes"),
    [
        (["parallel.tensor=4"], {}),  # more ranks than key-value heads: Megatron shares a head among ranks
        (["parallel.tensor=2", "parallel.expert=2", "parallel.expert_tensor=1"], {}),
        (["parallel.tensor=2", "parallel.expert_tensor=1"], {"moe_intermediate_size": 25}),
        (["parallel.pipeline=2", "parallel.virtual_pipeline=2"], {}),
        (["parallel.tensor=2"], {"intermediate_size": 49}),  # no layer of an all-MoE model has this width
        (["routing.replay=r3", "rollout.old_log_probs=engine"], {}),
        ([], DENSE),
        (["parallel.tensor=2"], DENSE),
    ],
)
def test_what_megatron_can_divide_is_accepted(
    load: Load, model: Write, overrides: list[str], shapes: dict[str, object]
) -> None:
    model(**shapes)
    load(*overrides)


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        ({"model_type": "llama"}, "a model of model_type the text 'llama'; accepted: qwen3_moe or qwen3"),
        ({"model_type": None}, "a model of model_type null; accepted: qwen3_moe or qwen3"),
        ({"num_experts": None}, "num_experts is null; accepted: whole numbers of at least 1"),
        ({"vocab_size": "96", "hidden_size": 0}, "vocab_size is the text '96', hidden_size is 0; accepted"),
        ({"num_experts_per_tok": 17}, "17 num_experts_per_tok; accepted: at most 16"),
        ({"num_key_value_heads": 3}, "8 num_attention_heads; accepted: a multiple of 3"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_by_the_field_that_names_it(
    recipe_file: Write, refusal: Refuse, model: Write, shapes: dict[str, object], told: str
) -> None:
    model(**shapes)
    message = refusal(recipe_file())
    assert "recipe.yaml:2: model.path holds a " in message
    assert told in message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "which holds no config.json; accepted: a Hugging Face checkpoint directory"),
        ("{", "holds a config.json that cannot be read"),
        ("[]", "holds a config.json of a list"),
    ],
)
def test_a_model_without_a_readable_config_is_refused(
    recipe_file: Write, refusal: Refuse, model: Write, text: str | None, told: str
) -> None:
    path, config = recipe_file(), model() / "config.json"
    if text is None:
        config.unlink()
    else:
        config.write_text(text)
    message = refusal(path)
    assert "recipe.yaml:2: model.path " in message
    assert told in message
