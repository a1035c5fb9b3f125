"""Writes the study's models: configuration and tokenizer, without weights, beside each other.

In: the shipped tiny model's directory. Out: one directory a model, like it but for depth, for the number of its experts, or dense.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tools.reproduce.study import Model

SHIPPED = Path("recipes/models/tiny_qwen3_moe")
MOE_FIELDS = (
    "decoder_sparse_step",
    "mlp_only_layers",
    "moe_intermediate_size",
    "norm_topk_prob",
    "num_experts",
    "num_experts_per_tok",
    "num_local_experts",
    "output_router_logits",
    "router_aux_loss_coef",
)


def write_model(model: Model, directory: Path) -> None:
    """Write `config.json` and the tokenizer's files to `directory`, which may hold them already."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in SHIPPED.iterdir():
        if file.name != "config.json":
            shutil.copyfile(file, directory / file.name)
    config = model_config(model, json.loads((SHIPPED / "config.json").read_text()))
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def model_config(model: Model, shipped: dict[str, Any]) -> dict[str, Any]:
    """The model's `config.json`. The dense one's network is as wide as all experts of a layer together."""
    config = shipped | {"num_hidden_layers": model.layers, "num_local_experts": model.experts}
    if not model.dense:
        return config
    width = shipped["moe_intermediate_size"] * shipped["num_local_experts"]
    kept = {name: value for name, value in config.items() if name not in MOE_FIELDS}
    return kept | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "intermediate_size": width}
