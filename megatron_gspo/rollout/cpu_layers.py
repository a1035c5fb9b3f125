"""Layers that make a Transformers model decode faster on the CPU, plugged in through Transformers' own registries.

A decoding step of a small model is many short operations; fewer and better-fitting ones are worth about a sixth of its
time. Each function computes what the one it stands in for computes, up to float round-off.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "megatron_gspo_cpu"


def use_cpu_layers(model: PreTrainedModel) -> None:
    """Have `model`, a Qwen3 or Qwen3-MoE on the CPU in evaluation mode, run the layers below. Its parameters stay."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    ExpertsInterface.register(NAME, run_experts)
    model.set_attn_implementation(NAME)
    if hasattr(model.config, "num_experts"):
        model.set_experts_implementation(NAME)
    for module in list(model.modules()):
        for child_name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, child_name, _rms_norm_of(child))


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention of one new token a row as two batched products; a prompt goes to `scaled_dot_product_attention`.

    For one query that kernel takes 1.5 times as long, because it is made for blocks of them.

    Args:
        query: [rows, heads, queries, head_dim].
        key, value: [rows, key-value heads, columns, head_dim].
        attention_mask: [rows, 1, 1, columns] float to be added, when there is one query.

    Returns:
        [rows, queries, heads, head_dim], and no attention weights.
    """
    num_rows, num_heads, num_queries, head_dim = query.shape
    if num_queries > 1 or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    num_groups = key.shape[1]
    grouped = query.reshape(num_rows, num_groups, num_heads // num_groups, head_dim)
    scores = torch.matmul(grouped, key.transpose(2, 3)).mul_(scaling).add_(attention_mask)
    attended = torch.matmul(scores.softmax(dim=-1), value)
    return attended.reshape(num_rows, 1, num_heads, head_dim), None


def run_experts(experts: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Every token [T, H] through its K experts, as two grouped products over (token, expert) pairs sorted by expert."""
    expert_of_pair = top_k_index.reshape(-1)
    order = expert_of_pair.argsort()
    token_of_pair = order // top_k_index.shape[1]
    ends = torch.bincount(expert_of_pair, minlength=experts.num_experts).cumsum(0, dtype=torch.int32)
    gate_up = F.grouped_mm(hidden.index_select(0, token_of_pair), experts.gate_up_proj.transpose(1, 2), offs=ends)
    gate, up = gate_up.chunk(2, dim=1)
    output = F.grouped_mm(experts.act_fn(gate).mul_(up), experts.down_proj.transpose(1, 2), offs=ends)
    output.mul_(top_k_weights.reshape(-1).index_select(0, order)[:, None])
    return torch.zeros_like(hidden).index_add_(0, token_of_pair, output)


def _rms_norm_of(norm: Any) -> nn.RMSNorm:
    """PyTorch's RMSNorm with the parameter of Transformers' own."""
    replacement = nn.RMSNorm(norm.weight.shape[0], eps=norm.variance_epsilon, device="meta")
    replacement.weight = norm.weight
    return replacement
