"""A recipe and a model to write down, change and load."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megatron_gspo.config import Recipe, load_recipe
from megatron_gspo.types import UserError

MODEL = {
    "model_type": "qwen3_moe",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
}
RECIPE = """\
model:
  path: model
data:
  train: arithmetic_chain
training:
  steps: 2
  prompts_per_step: 16
"""


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    """Writes `model/config.json`, with the fields given on top (None leaves one out)."""

    def write(**fields: object) -> Path:
        (tmp_path / "model").mkdir(exist_ok=True)
        config = {name: value for name, value in (MODEL | fields).items() if value is not None}
        (tmp_path / "model/config.json").write_text(json.dumps(config))
        return tmp_path / "model"

    write()
    return write


@pytest.fixture
def recipe_file(tmp_path: Path, model: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a recipe beside the model: the smallest one there is, followed by the text given."""

    def write(more: str = "", name: str = "recipe.yaml", start: str = RECIPE) -> Path:
        (tmp_path / name).write_text(start + more)
        return tmp_path / name

    return write


@pytest.fixture
def load(recipe_file: Callable[..., Path]) -> Callable[..., Recipe]:
    """Loads the smallest recipe with overrides."""
    return lambda *overrides: load_recipe(recipe_file(), overrides)


@pytest.fixture
def refusal() -> Callable[..., str]:
    """What the user is told of a recipe that is refused."""

    def message(path: Path, overrides: Sequence[str] = ()) -> str:
        with pytest.raises(UserError) as raised:
            load_recipe(path, overrides)
        return str(raised.value)

    return message
