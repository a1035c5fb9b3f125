"""What the model cannot be, or cannot be split into, is refused by the recipe's or the configuration's field."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3Config, Qwen3MoeConfig

from megatron_gspo.config import ParallelSection
from megatron_gspo.model.build import build_policy, check_layout, read_hf_config, transformer_config
from megatron_gspo.types import UserError
from tests.tiny_models import dense_config, model_section, moe_config


@pytest.mark.parametrize(
    ("config", "layout", "message"),
    [
        (moe_config(), {"tensor": 3}, r"parallel\.tensor is 3; .*num_attention_heads \(4\)"),
        (
            moe_config(num_attention_heads=12, num_key_value_heads=4, vocab_size=66),
            {"tensor": 6, "expert_tensor": 1},
            r"parallel\.tensor is 6; .*num_key_value_heads \(4\)",
        ),
        (dense_config(intermediate_size=49), {"tensor": 2}, r"parallel\.tensor is 2; .*intermediate_size \(49\)"),
        (moe_config(vocab_size=63), {"tensor": 2}, r"parallel\.tensor is 2; .*vocab_size \(63\)"),
        (moe_config(), {"expert": 3}, r"parallel\.expert is 3; .*num_experts \(8\)"),
        (moe_config(), {"pipeline": 3}, r"parallel\.pipeline is 3; .*num_hidden_layers \(4\)"),
        (moe_config(), {"pipeline": 2, "virtual_pipeline": 4}, r"virtual_pipeline is 4; .*a pipeline rank's 2 layers"),
        (moe_config(), {"virtual_pipeline": 2}, r"virtual_pipeline above 1 needs parallel\.pipeline above 1"),
        (
            moe_config(),
            {"expert_tensor": 8},
            r"expert_tensor is 8; .*multiple of 4 in float32 .*moe_intermediate_size \(16\)",
        ),
        (dense_config(), {"expert": 2}, r"parallel\.expert is 2; accepted: 1 for a dense model"),
    ],
)
def test_sizes_that_do_not_divide_the_model_are_refused(
    config: Qwen3Config | Qwen3MoeConfig, layout: dict[str, int], message: str
):
    with pytest.raises(UserError, match=message):
        check_layout(config, model_section(), ParallelSection(**layout))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and only 'silu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_type is 'linear'"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok 1 with norm_topk_prob"),
    ],
)
def test_what_megatron_would_compute_differently_is_refused(change: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        transformer_config(moe_config(**change), model_section(), ParallelSection())


def test_a_directory_without_a_usable_configuration_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="model_type is 'llama', and the accepted ones are qwen3, qwen3_moe"):
        read_hf_config(tmp_path)


def test_transformer_engine_is_refused_where_it_is_not_installed():
    with pytest.raises(UserError, match=r"model\.spec is transformer_engine"):
        build_policy(moe_config(), model_section(spec="transformer_engine"), ParallelSection())


def test_layers_have_experts_where_transformers_gives_them_experts():
    config = transformer_config(
        moe_config(mlp_only_layers=[1], decoder_sparse_step=2), model_section(), ParallelSection()
    )
    assert config.moe_layer_freq == [0, 0, 0, 1]
    assert transformer_config(moe_config(), model_section(), ParallelSection()).moe_layer_freq == 1


def test_the_load_balance_loss_is_off_unless_asked_for():
    config = transformer_config(moe_config(), model_section(), ParallelSection())
    assert config.moe_router_load_balancing_type == "none"
    config = transformer_config(moe_config(), model_section(), ParallelSection(), load_balance_coefficient=0.01)
    assert (config.moe_router_load_balancing_type, config.moe_aux_loss_coeff) == ("aux_loss", 0.01)
