"""Which modules a layer is built from: Transformer Engine's, or Megatron's own with this project's three.

In: the model's configuration. Out: Megatron's description of the layers of one pipeline stage. Both describe the same
model; the second runs on a CPU and on any GPU with plain PyTorch.
"""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_gspo.model.attention import CausalAttention
from megatron_gspo.model.experts import GroupedExperts
from megatron_gspo.model.norm import RMSNorm


class PlainTorchBackend(LocalSpecProvider):
    """Megatron's local modules, with norm, core attention and experts replaced by this project's."""

    def layer_norm(self, rms_norm: bool = True, for_qk: bool = False) -> type:
        """RMSNorm that sequence parallelism may use."""
        del rms_norm, for_qk
        return RMSNorm

    def core_attention(self) -> type:
        """Attention that takes packed sequences."""
        return CausalAttention

    def grouped_mlp_modules(
        self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool
    ) -> tuple[type, MLPSubmodules | None]:
        """Experts as grouped products; they have no submodules."""
        del moe_use_grouped_gemm, moe_use_legacy_grouped_gemm
        return GroupedExperts, None


def decoder_layers(
    config: TransformerConfig, *, use_transformer_engine: bool, virtual_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of this rank's pipeline stage (of its `virtual_stage`th chunk, where there are several)."""
    if use_transformer_engine:
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=virtual_stage)
    first = get_transformer_layer_offset(config, vp_stage=virtual_stage)
    count = get_num_layers_to_build(config, vp_stage=virtual_stage)
    layers = [_local_layer(config, is_moe=is_moe_layer(config, index)) for index in range(first, first + count)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def is_moe_layer(config: TransformerConfig, index: int) -> bool:
    """Whether layer `index`, counted from 0 over all pipeline stages, has experts."""
    if config.num_moe_experts is None:
        return False
    pattern = config.moe_layer_freq
    return bool(pattern[index]) if isinstance(pattern, list) else index % pattern == 0


def _local_layer(config: TransformerConfig, *, is_moe: bool) -> ModuleSpec:
    backend = PlainTorchBackend()
    attention = SelfAttentionSubmodules(
        linear_qkv=backend.column_parallel_linear(),
        core_attention=backend.core_attention(),
        linear_proj=backend.row_parallel_linear(),
        q_layernorm=backend.layer_norm(for_qk=True),
        k_layernorm=backend.layer_norm(for_qk=True),
    )
    mlp = get_mlp_module_spec_for_backend(
        backend, num_experts=config.num_moe_experts if is_moe else None, moe_grouped_gemm=is_moe
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.layer_norm(),
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=backend.layer_norm(),
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            # Checkpoints carry the names that Transformer Engine's fused modules give the norms.
            sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
            | ({} if is_moe else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}),
        ),
    )
