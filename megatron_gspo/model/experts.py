"""All experts of a rank in two grouped matrix products, for models without Transformer Engine.

In: the tokens dispatched to this rank, sorted by expert. Out: each token's expert output, scaled by its gate. The module
takes the place of Megatron's SequentialMLP or GroupedMLP (transformer/moe/experts.py, 0.16.1) in an MoE layer: the first
loops over experts in Python, the second needs the CUDA-only `grouped_gemm` package.

Shape legend: T dispatched tokens, E experts on this rank, H hidden size, I expert width on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedStateDict, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import CheckpointWithoutOutput
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, linear, silu

from megatron_gspo.config.layout_fit import ROW_ALIGNMENT_BYTES
from megatron_gspo.platform import device


class GroupedExperts(MegatronModule):
    """SwiGLU experts without biases, their weights stacked by expert."""

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config=config)
        assert config.gated_linear_unit and config.activation_func is silu and not config.add_bias_linear
        self.num_local_experts = num_local_experts
        self.expert_group = pg_collection.ep
        self.tensor_group = pg_collection.expt_tp
        self.data_group = pg_collection.expt_dp
        width, remainder = divmod(config.moe_ffn_hidden_size, self.tensor_group.size())
        assert remainder == 0, "the expert width is divided over the expert-tensor-parallel ranks"
        self.recompute_activation = (
            config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules
        )
        # [E, 2I, H]: gate rows above up rows, as in Megatron's linear_fc1; and [E, H, I].
        self.weight1 = self._stacked_weight(2 * width, config.hidden_size, split_dimension=1, stride=2)
        self.weight2 = self._stacked_weight(config.hidden_size, width, split_dimension=2, stride=1)
        config.init_method(self.weight1)
        config.output_layer_init_method(self.weight2)

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Run every token through its expert.

        Args:
            permuted_local_hidden_states: [T, H], tokens of expert 0 first, then of expert 1, and so on.
            tokens_per_expert: [E] int64, summing to T.
            permuted_probs: [T], the gate each token's output is scaled by.

        Returns:
            [T, H], and None in place of a bias, as Megatron's experts return.
        """
        hidden, probs = permuted_local_hidden_states, permuted_probs.unsqueeze(-1)
        if hidden.shape[0] == 0:
            return self._connect_to_no_tokens(hidden, probs), None
        ends = tokens_per_expert.cumsum(0).to(device=hidden.device, dtype=torch.int32)
        gate_and_up = _product_by_expert(hidden, self.weight1, ends)
        if not self.recompute_activation:
            return _product_by_expert(_gated_activation(gate_and_up, probs), self.weight2, ends), None
        checkpoint = CheckpointWithoutOutput(fp8=None)  # by default it asks Transformer Engine about fp8
        activation = checkpoint.checkpoint(_gated_activation, gate_and_up, probs)
        output = _product_by_expert(activation, self.weight2, ends)
        checkpoint.discard_output_and_register_recompute(output)
        return output, None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """The weights under the keys and global shapes that Megatron's SequentialMLP gives its experts'."""
        assert not (metadata or {}).get("singleton_local_shards", False), "experts are saved as one stacked tensor"
        return {
            f"{prefix}weight1": self._sharded_weight(
                self.weight1, f"{prefix}weight1", f"{prefix}experts.linear_fc1.weight", sharded_offsets
            ),
            f"{prefix}weight2": self._sharded_weight(
                self.weight2, f"{prefix}weight2", f"{prefix}experts.linear_fc2.weight", sharded_offsets
            ),
        }

    def backward_dw(self) -> None:
        """Weight gradients come with the backward pass itself (Megatron calls this for modules that delay them)."""

    def _stacked_weight(self, rows: int, columns: int, *, split_dimension: int, stride: int) -> nn.Parameter:
        """An [E, rows, columns] parameter with the attributes by which Megatron knows how it is sharded."""
        dtype = self.config.params_dtype
        assert rows * dtype.itemsize % ROW_ALIGNMENT_BYTES == 0 and columns * dtype.itemsize % ROW_ALIGNMENT_BYTES == 0
        weight = nn.Parameter(torch.empty(self.num_local_experts, rows, columns, dtype=dtype, device=device()))
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=split_dimension, stride=stride)
        # Megatron's experts say this only where expert > 1. Said always, the gradient is reduced over the expert-data
        # group, which is right in every layout (with expert_tensor < tensor and expert = 1 the other is not), and an
        # optimizer's parameters are grouped alike in all of them.
        weight.allreduce = False  # type: ignore[attr-defined]
        return weight

    def _connect_to_no_tokens(self, hidden: Tensor, probs: Tensor) -> Tensor:
        """No token came, yet every weight must get a gradient, of zero, or its reduction would be waited for."""
        activation = _gated_activation(linear(hidden, self.weight1[0]), probs)
        return linear(activation, self.weight2[0])

    def _sharded_weight(
        self, weight: Tensor, name: str, key: str, sharded_offsets: tuple[tuple[int, int, int], ...]
    ) -> ShardedTensorFactory:
        axis = len(sharded_offsets)
        experts = (axis, self.expert_group.rank(), self.expert_group.size())
        rank, size = self.tensor_group.rank(), self.tensor_group.size()

        def shard(
            key: str, part: Tensor, split_axis: int, index: int, count: int, replica_id: ReplicaId
        ) -> ShardedTensor:
            return ShardedTensor.from_rank_offsets(
                key,
                part.contiguous(),
                *sharded_offsets,
                experts,
                (axis + split_axis, index, count),
                replica_id=replica_id,
                prepend_axis_num=axis,
            )

        def split(
            key: str, tensor: Tensor, replica_id: ReplicaId, flattened_range: slice | None
        ) -> list[ShardedTensor]:
            # `key` is not the one below: layers and optimizers rename a factory after it was made.
            assert flattened_range is None, f"{key}: flattened optimizer shards of experts are not supported"
            # All ranks' gate rows come before all ranks' up rows, so that any number of ranks can load them. One rank's
            # are so as they lie, and need no copy.
            if name.endswith("weight2") or size == 1:
                return [shard(key, tensor, 2, rank, size, replica_id)]
            gate, up = tensor.chunk(2, dim=1)
            return [
                shard(key, gate, 1, rank, 2 * size, replica_id),
                shard(key, up, 1, size + rank, 2 * size, replica_id),
            ]

        return ShardedTensorFactory(
            key=key,
            data=weight,
            build_fn=split,
            merge_fn=lambda parts: parts[0] if len(parts) == 1 else torch.cat(parts, dim=1),
            replica_id=(0, 0, self.data_group.rank()),
        )


def _product_by_expert(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows [ends[e - 1], ends[e]) of `x` [T, in] times the transpose of weight[e] [out, in]: [T, out]."""
    product = grouped_mm(x, weight.transpose(-2, -1), offs=ends)
    if product.requires_grad:
        # The backward of grouped_mm refuses gradients with other strides, such as expanded ones.
        product.register_hook(torch.Tensor.contiguous)
    return product


def _gated_activation(gate_and_up: Tensor, probs: Tensor) -> Tensor:
    """silu(gate) · up · prob, [T, 2I] and [T, 1] to [T, I]; the gate's float32 is kept until the product is rounded."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    return (silu(gate) * up * probs).to(gate_and_up.dtype)
