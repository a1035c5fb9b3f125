"""What must hold between parallel sizes and the model they divide, by the rules of Megatron-Core 0.16.1.

In: the recipe's model and parallel sections, and the model's shapes by the names of a Hugging Face `config.json`. Out: what
is refused, nothing where all fits. The one place that knows: recipes are checked here before anything is built, models
when they are built, and the layouts that `tools/plan.py` finds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_gspo.config.refusal import Refusal, not_accepted
from megatron_gspo.config.schema import ModelSection, ParallelSection

#: Bytes of which a row must be a multiple in the grouped products of this project's own layers (torch's grouped_mm).
ROW_ALIGNMENT_BYTES = 16


def layout_refusals(model: ModelSection, parallel: ParallelSection, shapes: Mapping[str, Any]) -> Iterator[Refusal]:
    """What of `parallel` does not divide the model. Whether its experts are too narrow stands apart (`row_refusals`)."""
    yield from _check_attention(parallel, shapes)
    yield from _check_layers(parallel, shapes)
    yield from _check_dense(parallel, shapes) if shapes["model_type"] == "qwen3" else _check_experts(parallel, shapes)
    if model.spec == "local":
        yield from row_refusals(model, parallel, shapes)


def row_refusals(model: ModelSection, parallel: ParallelSection, shapes: Mapping[str, Any]) -> Iterator[Refusal]:
    """What the grouped products of this project's own layers cannot take. Transformer Engine's pad by themselves."""
    if shapes["model_type"] == "qwen3":
        return
    multiple = ROW_ALIGNMENT_BYTES // (2 if model.dtype == "bfloat16" else 4)
    own = "of the layers without Transformer Engine"
    if shapes["hidden_size"] % multiple:
        yield Refusal(
            "model.path",
            f"holds a config.json whose hidden_size is {shapes['hidden_size']}; accepted in {model.dtype} by the experts "
            f"{own}: a multiple of {multiple}",
        )
    width = shapes["moe_intermediate_size"]
    if width // parallel.expert_tensor_size % multiple:
        yield not_accepted(
            "parallel.expert_tensor",
            parallel.expert_tensor_size,
            f"what leaves the experts {own} a multiple of {multiple} in {model.dtype} of the model's "
            f"moe_intermediate_size ({width})",
        )


def _check_attention(parallel: ParallelSection, shapes: Mapping[str, Any]) -> Iterator[Refusal]:
    tensor, groups = parallel.tensor, shapes["num_key_value_heads"]
    for name in ("num_attention_heads", "vocab_size"):
        if shapes[name] % tensor:
            yield not_accepted("parallel.tensor", tensor, f"a divisor of the model's {name} ({shapes[name]})")
    # transformer_config.py: above the number of groups, several ranks share one group's key and value head.
    if groups % tensor and tensor % groups:
        yield not_accepted(
            "parallel.tensor", tensor, f"a divisor or a multiple of the model's num_key_value_heads ({groups})"
        )


def _check_layers(parallel: ParallelSection, shapes: Mapping[str, Any]) -> Iterator[Refusal]:
    layers = shapes["num_hidden_layers"]
    if layers % parallel.pipeline:
        yield not_accepted(
            "parallel.pipeline",
            parallel.pipeline,
            f"a divisor of the model's num_hidden_layers ({layers}): {_divisors(layers)}",
        )
    elif layers // parallel.pipeline % (parallel.virtual_pipeline or 1):
        yield not_accepted(
            "parallel.virtual_pipeline",
            parallel.virtual_pipeline,
            f"a divisor of a pipeline rank's {layers // parallel.pipeline} layers: {_divisors(layers // parallel.pipeline)}",
        )
    all_moe = shapes["model_type"] == "qwen3_moe" and not (
        shapes.get("mlp_only_layers") or shapes.get("decoder_sparse_step", 1) != 1
    )
    if not all_moe and shapes["intermediate_size"] % parallel.tensor:
        yield not_accepted(
            "parallel.tensor",
            parallel.tensor,
            f"a divisor of the model's intermediate_size ({shapes['intermediate_size']})",
        )


def _check_experts(parallel: ParallelSection, shapes: Mapping[str, Any]) -> Iterator[Refusal]:
    experts, width, expert_tensor = shapes["num_experts"], shapes["moe_intermediate_size"], parallel.expert_tensor_size
    if experts % parallel.expert:
        yield not_accepted(
            "parallel.expert",
            parallel.expert,
            f"a divisor of the model's num_experts ({experts}): {_divisors(experts)}",
        )
    if width % expert_tensor:
        yield not_accepted(
            "parallel.expert_tensor",
            expert_tensor,
            f"a divisor of the model's moe_intermediate_size ({width}); null takes parallel.tensor ({parallel.tensor})",
        )


def _check_dense(parallel: ParallelSection, shapes: Mapping[str, Any]) -> Iterator[Refusal]:
    del shapes
    because = "for a dense model (model_type qwen3), which has no experts"
    if parallel.expert > 1:
        yield not_accepted("parallel.expert", parallel.expert, f"1 {because}")
    if parallel.expert_tensor is not None:
        yield not_accepted("parallel.expert_tensor", parallel.expert_tensor, f"null {because}")


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
