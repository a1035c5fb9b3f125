"""From a Hugging Face configuration to this rank's part of the policy model.

In: a checkpoint directory's `config.json` (Qwen3-MoE or dense Qwen3) and the recipe's model and parallel sections. Out:
`PolicyModel` chunks on this rank's device, one a virtual pipeline stage (usually one), their weights still undefined:
`hf_weights` loads or draws them. What Megatron cannot compute as Hugging Face does is refused.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TypeAlias

import torch
from huggingface_hub.errors import StrictDataclassError
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import silu
from transformers import Qwen3Config, Qwen3MoeConfig

from megatron_gspo.config import ModelSection, ParallelSection
from megatron_gspo.config.layout_fit import layout_refusals, row_refusals
from megatron_gspo.model.layer_spec import decoder_layers
from megatron_gspo.model.policy import PolicyModel
from megatron_gspo.platform import detect_machine, device
from megatron_gspo.types import UserError

HfConfig: TypeAlias = Qwen3Config | Qwen3MoeConfig

_CONFIG_CLASSES: dict[str, type[HfConfig]] = {"qwen3": Qwen3Config, "qwen3_moe": Qwen3MoeConfig}
_SHAPES_OF_LAYOUT = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts",
    "moe_intermediate_size",
    "mlp_only_layers",
    "decoder_sparse_step",
)


def build_policy(
    source: Path | HfConfig,
    model: ModelSection,
    parallel: ParallelSection,
    *,
    load_balance_coefficient: float = 0.0,
) -> list[PolicyModel]:
    """Build this rank's chunks of the model; the weights are undefined until they are loaded or initialised.

    Args:
        source: a checkpoint directory, or a configuration (`model.path` is not read).
        model: `dtype`, `spec`, `recompute` and `log_probs_chunk_tokens` are used.
        parallel: the sizes `parallel.initialize_model_parallel` was given.
        load_balance_coefficient: weight of the router's auxiliary load-balance loss; 0 in reinforcement learning, where
            the routing is to follow the reward alone.

    Raises:
        UserError: an unknown or unsupported model, or sizes that do not divide it.
    """
    hf_config = read_hf_config(source) if isinstance(source, Path) else source
    check_layout(hf_config, model, parallel)
    config = transformer_config(hf_config, model, parallel, load_balance_coefficient=load_balance_coefficient)
    count = num_chunks(parallel)
    return [
        _build_chunk(hf_config, config, model, virtual_stage=index if count > 1 else None) for index in range(count)
    ]


def num_chunks(parallel: ParallelSection) -> int:
    """Model chunks a pipeline rank holds."""
    return parallel.virtual_pipeline or 1


def read_hf_config(path: Path) -> HfConfig:
    """The configuration in a checkpoint directory.

    Raises:
        UserError: there is none, it is not JSON, or it is not of a supported model.
    """
    file = path / "config.json"
    try:
        model_type = json.loads(file.read_text()).get("model_type")
    except OSError as error:
        raise UserError(f"model.path: {file} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if model_type not in _CONFIG_CLASSES:
        accepted = ", ".join(_CONFIG_CLASSES)
        raise UserError(f"{file}: model_type is {model_type!r}, and the accepted ones are {accepted}")
    try:
        return _CONFIG_CLASSES[model_type].from_pretrained(path)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise UserError(f"{file}: {' '.join(str(error).split())}") from error


def transformer_config(
    hf_config: HfConfig, model: ModelSection, parallel: ParallelSection, *, load_balance_coefficient: float = 0.0
) -> TransformerConfig:
    """Megatron's configuration of the same model.

    Gradients are summed, not averaged, over micro-batches and data-parallel ranks (`calculate_per_token_loss`): the
    denominators of the losses are global.

    Raises:
        UserError: the model uses something that is not supported.
    """
    _check_supported(hf_config)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[model.dtype]
    machine = detect_machine()
    with_engine = uses_transformer_engine(model)
    with warnings.catch_warnings():
        # Megatron warns that recomputing the core attention may be needless with Transformer Engine.
        warnings.filterwarnings("ignore", message="If you are using transformer_engine")
        # It also calls its own default for CUDA graphs, which are not used, deprecated.
        warnings.filterwarnings("ignore", message="full scope is deprecated")
        config = TransformerConfig(
            num_layers=hf_config.num_hidden_layers,
            hidden_size=hf_config.hidden_size,
            ffn_hidden_size=hf_config.intermediate_size,
            num_attention_heads=hf_config.num_attention_heads,
            num_query_groups=hf_config.num_key_value_heads,
            kv_channels=head_size(hf_config),
            qk_layernorm=True,
            normalization="RMSNorm",
            layernorm_epsilon=hf_config.rms_norm_eps,
            activation_func=silu,
            gated_linear_unit=True,
            add_bias_linear=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            **_moe_options(hf_config, load_balance_coefficient),
            **_recompute_options(hf_config, model),
            **_parallel_options(parallel),
            pipeline_dtype=dtype,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            calculate_per_token_loss=True,
            bias_activation_fusion=with_engine,
            apply_rope_fusion=with_engine,
            gradient_accumulation_fusion=machine.has_cuda and machine.apex,
            # The weights come from `hf_weights`. Initialisation itself cannot be off: it is what marks parameters as
            # sharded, without which Megatron counts most of them once a rank too few in the gradient norm.
            perform_initialization=True,
            init_method=_leave_undefined,
            output_layer_init_method=_leave_undefined,
            embedding_init_method=_leave_undefined,
        )
    # Packed micro-batches differ in length. Set afterwards, because transformer_config.py refuses it together with
    # `allgather`; what that cannot take is ranks that differ at one time, which config/check.py refuses.
    config.variable_seq_lengths = True
    return config


def _parallel_options(parallel: ParallelSection) -> dict[str, object]:
    """How the model is divided over the ranks."""
    interleaved = num_chunks(parallel) > 1
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "sequence_parallel": parallel.tensor > 1,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
        "context_parallel_size": parallel.context,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": num_chunks(parallel) if interleaved else None,
        "moe_token_dispatcher_type": parallel.dispatcher if _dispatches(parallel) else "allgather",
        # With two stages the next one is also the previous one: Megatron's batched sends would cross there.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
    }


def _dispatches(parallel: ParallelSection) -> bool:
    """Whether tokens go to other ranks' experts. Where none do, Megatron's `allgather` gathers nothing, while its
    `alltoall` cuts the tokens by expert and puts them together again, three more copies (token_dispatcher.py, 0.16.1)."""
    return parallel.expert * parallel.expert_tensor_size > 1


def check_layout(hf_config: HfConfig, model: ModelSection, parallel: ParallelSection) -> None:
    """Refuse parallel sizes that do not divide what they split.

    Raises:
        UserError: naming the recipe's field, its value, and what it must divide.
    """
    shapes = {name: getattr(hf_config, name, None) for name in _SHAPES_OF_LAYOUT}
    refusals = [*layout_refusals(model, parallel, shapes)]
    if not refusals and not uses_transformer_engine(model):
        refusals += row_refusals(model, parallel, shapes)
    if refusals:
        raise UserError(str(refusals[0]))
    if num_chunks(parallel) > 1 and parallel.pipeline == 1:
        raise UserError("parallel.virtual_pipeline above 1 needs parallel.pipeline above 1")


def uses_transformer_engine(model: ModelSection) -> bool:
    """Whether `model.spec` comes out as Transformer Engine's layers on this machine.

    Raises:
        UserError: it is asked for and not installed.
    """
    machine = detect_machine()
    available = machine.transformer_engine is not None and machine.has_cuda
    if model.spec == "transformer_engine" and not available:
        raise UserError(
            "model.spec is transformer_engine, but this machine has no Transformer Engine with a GPU; "
            "`auto` and `local` work here"
        )
    chosen = available and model.spec != "local"
    if machine.has_cuda and not chosen and model.dtype == "float32":
        raise UserError(
            "model.dtype is float32, but on a GPU this project's own layers compute in bfloat16 alone "
            "(torch's varlen attention and grouped_mm); accepted: model.dtype=bfloat16, or Transformer Engine's layers"
        )
    return chosen


def head_size(hf_config: HfConfig) -> int:
    """Dimensions of an attention head; Qwen3-MoE's configuration may leave it to the other sizes."""
    return getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads


def _build_chunk(
    hf_config: HfConfig, config: TransformerConfig, model: ModelSection, *, virtual_stage: int | None
) -> PolicyModel:
    policy = PolicyModel(
        config=config,
        transformer_layer_spec=decoder_layers(
            config, use_transformer_engine=uses_transformer_engine(model), virtual_stage=virtual_stage
        ),
        vocab_size=hf_config.vocab_size,
        max_sequence_length=hf_config.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual_stage),
        share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
        rotary_base=hf_config.rope_parameters["rope_theta"],
        vp_stage=virtual_stage,
        log_probs_chunk_tokens=model.log_probs_chunk_tokens,
        rotary_in_attention=not uses_transformer_engine(model),
    )
    return policy.to(device())


def _moe_options(hf_config: HfConfig, load_balance_coefficient: float) -> dict[str, object]:
    if not isinstance(hf_config, Qwen3MoeConfig):
        return {}
    pattern = _moe_layer_pattern(hf_config)
    return {
        "num_moe_experts": hf_config.num_experts,
        "moe_ffn_hidden_size": hf_config.moe_intermediate_size,
        # 1 for "every layer": with a list Megatron numbers the layers in checkpoints one by one.
        "moe_layer_freq": 1 if all(pattern) else pattern,
        "moe_router_topk": hf_config.num_experts_per_tok,
        # Softmax over the chosen experts equals softmax over all of them, renormalised.
        "moe_router_pre_softmax": not hf_config.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss" if load_balance_coefficient else "none",
        "moe_aux_loss_coeff": load_balance_coefficient,
        "moe_grouped_gemm": True,
    }


def _moe_layer_pattern(hf_config: HfConfig) -> list[int]:
    """1 for each layer with experts, 0 for each without."""
    if not isinstance(hf_config, Qwen3MoeConfig):
        return [0] * hf_config.num_hidden_layers
    return [
        int(layer not in hf_config.mlp_only_layers and (layer + 1) % hf_config.decoder_sparse_step == 0)
        for layer in range(hf_config.num_hidden_layers)
    ]


def _recompute_options(hf_config: HfConfig, model: ModelSection) -> dict[str, object]:
    if model.recompute == "none":
        return {}
    if model.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    experts = ["moe_act"] if isinstance(hf_config, Qwen3MoeConfig) else []
    return {"recompute_granularity": "selective", "recompute_modules": ["core_attn", *experts]}


def _check_supported(hf_config: HfConfig) -> None:
    rope_type = (hf_config.rope_parameters or {}).get("rope_type", "default")
    requirements = [
        ("hidden_act", hf_config.hidden_act, "silu"),
        ("attention_bias", hf_config.attention_bias, False),
        ("use_sliding_window", hf_config.use_sliding_window, False),
        ("rope_parameters.rope_type", rope_type, "default"),
    ]
    for name, given, accepted in requirements:
        if given != accepted:
            raise UserError(f"config.json: {name} is {given!r}, and only {accepted!r} is supported")
    if isinstance(hf_config, Qwen3MoeConfig) and hf_config.num_experts_per_tok == 1 and hf_config.norm_topk_prob:
        raise UserError(
            "config.json: num_experts_per_tok 1 with norm_topk_prob makes every gate 1, so that the router cannot learn"
        )


def _leave_undefined(weight: torch.Tensor) -> None:
    """Megatron's hook for initialising a weight."""
