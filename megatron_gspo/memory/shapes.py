"""The model's sizes, and which parameters each rank holds of it.

In: a Hugging Face `config.json`. Out: `ModelShapes`, and the parameters of one model chunk on one rank in the order in
which Megatron-Core registers them, which decides where they lie in its buffers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_gspo.config import ParallelSection


class Parameter(NamedTuple):
    """One parameter of a rank."""

    numel: int
    is_expert: bool = False  # reduced over the expert-data group
    shared_embedding: bool = False  # a tied embedding of which two pipeline stages hold a copy


@dataclass(frozen=True)
class ModelShapes:
    """The sizes of the whole model."""

    vocabulary: int
    hidden: int
    head: int
    query: int  # all query heads together
    key_value: int  # all key (or value) heads together
    mlp: int  # width of a layer without experts
    experts: int
    top_k: int
    expert_width: int
    moe_layers: tuple[bool, ...]  # one a layer
    tied_embeddings: bool

    @classmethod
    def of(cls, hf_config: Mapping[str, Any]) -> ModelShapes:
        """From a `config.json` that `config.check_recipe_against_model` accepts."""
        is_moe = hf_config["model_type"] == "qwen3_moe"
        heads = hf_config["num_attention_heads"]
        head = hf_config.get("head_dim") or hf_config["hidden_size"] // heads
        dense_layers = hf_config.get("mlp_only_layers") or []
        every = hf_config.get("decoder_sparse_step", 1)
        return cls(
            vocabulary=hf_config["vocab_size"],
            hidden=hf_config["hidden_size"],
            head=head,
            query=heads * head,
            key_value=hf_config["num_key_value_heads"] * head,
            mlp=hf_config["intermediate_size"],
            # Transformers 5 writes the number of experts under another name than the checkpoints it reads.
            experts=hf_config.get("num_experts", hf_config.get("num_local_experts", 0)) if is_moe else 0,
            top_k=hf_config["num_experts_per_tok"] if is_moe else 0,
            expert_width=hf_config["moe_intermediate_size"] if is_moe else 0,
            moe_layers=tuple(
                is_moe and layer not in dense_layers and (layer + 1) % every == 0
                for layer in range(hf_config["num_hidden_layers"])
            ),
            tied_embeddings=hf_config.get("tie_word_embeddings", False),
        )

    @classmethod
    def read(cls, model_path: Path) -> ModelShapes:
        """From a checkpoint directory whose `config.json` `load_recipe` has accepted."""
        return cls.of(json.loads((model_path / "config.json").read_text(encoding="utf-8")))

    @property
    def num_parameters(self) -> int:
        """Of the whole model, a tied embedding counted once."""
        return sum(parameter.numel for parameter in chunk_parameters(self, ParallelSection(), 0, 0))

    @property
    def num_active_parameters(self) -> int:
        """Those a token passes through: of each layer's experts the top-k. The embeddings count."""
        idle = (self.experts - self.top_k) * 3 * self.hidden * self.expert_width
        return self.num_parameters - idle * sum(self.moe_layers)


def chunk_layers(num_layers: int, parallel: ParallelSection, stage: int, chunk: int) -> range:
    """The layers of one chunk of a pipeline stage, from 0 (Megatron's get_transformer_layer_offset)."""
    chunks = parallel.virtual_pipeline or 1
    per_chunk = num_layers // (parallel.pipeline * chunks)
    first = (chunk * parallel.pipeline + stage) * per_chunk
    return range(first, first + per_chunk)


def chunk_parameters(shapes: ModelShapes, parallel: ParallelSection, stage: int, chunk: int) -> list[Parameter]:
    """What one rank of a pipeline stage holds of one chunk, in the order of `named_parameters`.

    The order is that of the layers without Transformer Engine; with it a few norms of `hidden` elements change places.
    """
    vocabulary_rows = shapes.vocabulary // parallel.tensor * shapes.hidden
    is_first = stage == 0 and chunk == 0
    is_last = stage == parallel.pipeline - 1 and chunk == (parallel.virtual_pipeline or 1) - 1
    # language_module.py: with one stage a tied embedding is one parameter; else the last stage holds a copy.
    copied = shapes.tied_embeddings and parallel.pipeline > 1
    parameters = [Parameter(vocabulary_rows, shared_embedding=copied)] if is_first else []
    for layer in chunk_layers(len(shapes.moe_layers), parallel, stage, chunk):
        parameters += _layer_parameters(shapes, parallel, is_moe=shapes.moe_layers[layer])
    if is_last:
        parameters.append(Parameter(shapes.hidden))
        if copied or not shapes.tied_embeddings:
            parameters.append(Parameter(vocabulary_rows, shared_embedding=copied))
    return parameters


def _layer_parameters(shapes: ModelShapes, parallel: ParallelSection, *, is_moe: bool) -> Iterator[Parameter]:
    tensor, hidden = parallel.tensor, shapes.hidden
    yield Parameter(hidden)  # input norm
    yield Parameter(hidden * shapes.query // tensor)  # attention's output
    yield Parameter(hidden * (shapes.query + 2 * shapes.key_value) // tensor)
    yield Parameter(shapes.head)  # norms of queries and keys
    yield Parameter(shapes.head)
    yield Parameter(hidden)  # norm before the MLP
    if not is_moe:
        yield Parameter(2 * hidden * shapes.mlp // tensor)
        yield Parameter(hidden * shapes.mlp // tensor)
        return
    yield Parameter(shapes.experts * hidden)  # router
    stacked = shapes.experts // parallel.expert * hidden * (shapes.expert_width // parallel.expert_tensor_size)
    yield Parameter(2 * stacked, is_expert=True)  # gate and up
    yield Parameter(stacked, is_expert=True)  # down
