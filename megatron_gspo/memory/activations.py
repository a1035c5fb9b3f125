"""What the layers keep of a micro-batch until its backward pass, in bytes, term by term.

In: the model, the layout, the tokens of a micro-batch. Out: bytes on one rank. Each term names the source of what keeps
it. On a CPU the sum is checked against the tensors that autograd saves (tests/unit/memory/test_activations.py); the terms
of a GPU follow from the same source and have not been measured on one.

Shape legend: S tokens of a micro-batch held here (of all, one in `context`), s those of them that sequence parallelism
leaves a rank (one in `tensor`), H hidden size, Q and G widths of all query and all key heads on this rank, T rows
dispatched to this rank's experts, I expert width on this rank, E experts, K experts a token, b bytes of an element.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_gspo.config import ParallelSection
from megatron_gspo.memory.shapes import ModelShapes

FLOAT32, INT64 = 4, 8

#: Rows of the rank whose experts are asked for most, over an even share: reinforcement learning balances no load.
EXPERT_LOAD = 1.5


@dataclass(frozen=True)
class Activations:
    """Reckons what is kept of one micro-batch."""

    shapes: ModelShapes
    parallel: ParallelSection
    element_bytes: int  # b
    recompute: str  # `model.recompute`
    tokens: int  # of a whole micro-batch
    cuda: bool = True

    @property
    def held_tokens(self) -> int:
        """S."""
        return -(-self.tokens // self.parallel.context)

    @property
    def sequence_tokens(self) -> int:
        """s."""
        return -(-self.held_tokens // self.parallel.tensor)

    @property
    def expert_rows(self) -> int:
        """T: of the E·K rows that expert × expert_tensor ranks dispatch, each expert-tensor rank gets all of its experts'."""
        load = EXPERT_LOAD if self.parallel.expert > 1 else 1.0
        return int(self.sequence_tokens * self.shapes.top_k * self.parallel.expert_tensor_size * load)

    def layer(self, *, is_moe: bool) -> int:
        """Kept by one layer, as `recompute` says; under `full` its input alone (transformer_block.py, checkpointed)."""
        if self.recompute == "full":
            return self.layer_input()
        return self._layer(is_moe=is_moe, selective=self.recompute == "selective")

    def layer_input(self) -> int:
        """The hidden states between two layers, [s, H]."""
        return self.sequence_tokens * self.shapes.hidden * self.element_bytes

    def recomputed(self, *, is_moe: bool) -> int:
        """What the backward pass of one layer computes again and holds meanwhile, beyond what was kept."""
        whole = self._layer(is_moe=is_moe, selective=False)
        return whole if self.recompute == "full" else max(0, whole - self.layer(is_moe=is_moe))

    def passing(self, *, is_moe: bool) -> int:
        """Gradients that the backward pass of one layer holds at a time: of the widest products' inputs and outputs, and
        of the weights in the model's dtype, which Megatron then adds to its buffer (distributed_data_parallel.py)."""
        shapes, b = self.shapes, self.element_bytes
        if not is_moe:
            width = shapes.mlp // self.parallel.tensor
            return self.held_tokens * (2 * shapes.hidden + 4 * width) * b + 2 * shapes.hidden * width * b
        width = shapes.expert_width // self.parallel.expert_tensor_size
        weight = 2 * shapes.experts // self.parallel.expert * shapes.hidden * width
        return self.expert_rows * (2 * shapes.hidden + 4 * width) * b + weight * b

    def first_stage(self) -> int:
        """Token ids, which the embedding keeps."""
        return self.held_tokens * INT64

    def last_stage(self) -> int:
        """Final norm, the gathered hidden states, those of the response tokens with their gradient, and what
        `log_probs.py` keeps of each. Every token counts as one of a response."""
        hidden = self.held_tokens * self.shapes.hidden * self.element_bytes
        passing = 2 * hidden if self.cuda else 0  # gathered, and the gradient: alive in between, not kept
        positions, target, statistics = INT64, INT64, 2 * FLOAT32
        kept = self.held_tokens * (positions + target + statistics) + self.held_tokens * INT64
        return self._norm(self.sequence_tokens, self.shapes.hidden) + hidden + passing + kept

    def _layer(self, *, is_moe: bool, selective: bool) -> int:
        norms = 2 * self._norm(self.sequence_tokens, self.shapes.hidden)  # transformer_layer.py
        # layers.py keeps the input of linear_qkv, sharded; attention's own follow.
        attention = self.layer_input() + self._attention(selective=selective)
        return norms + attention + (self._experts(selective=selective) if is_moe else self._mlp())

    def _norm(self, tokens: int, width: int, rows: int = 1) -> int:
        """norm.py: the input and 1/rms in float32. In bfloat16 without CUDA, PyTorch composes the norm and keeps the input
        and the normalised input, both in float32."""
        per_element = self.element_bytes if self.cuda or self.element_bytes == FLOAT32 else 2 * FLOAT32
        return tokens * (width * per_element + rows * FLOAT32)

    def _attention(self, *, selective: bool) -> int:
        shapes, b = self.shapes, self.element_bytes
        query, key = shapes.query // self.parallel.tensor, max(shapes.key_value // self.parallel.tensor, shapes.head)
        joined = query + 2 * key  # linear_qkv's output: as long as keys or values are views of it
        heads = query // shapes.head
        # attention.py (Megatron): norms of queries (a copy) and keys (a view of the joined output).
        kept = self._norm(1, query + key, heads + key // shapes.head)
        keeps_joined = self.cuda or selective or b == FLOAT32
        kept += joined * b if keeps_joined else 0
        if self.cuda or b == FLOAT32:
            kept -= key * b  # its view is counted in the joined output
        kept += query * b  # linear_proj's input
        if selective:  # the checkpoint keeps queries, keys and values; values are a view
            return self.held_tokens * (kept + (query + key) * b)
        log_sum_exp = heads * FLOAT32
        if not self.cuda:  # attention.py: copies of all three in padded batches, and the output before it is put back
            return self.held_tokens * (kept + (2 * query + 2 * key) * b + log_sum_exp + 2 * INT64)
        if self.parallel.context == 1:  # varlen_attn; its output is linear_proj's input
            return self.held_tokens * (kept + (query + key) * b + log_sum_exp)
        # context_attention.py: of the gathered keys and values those that this rank's chunks see
        seen = self.tokens + self.held_tokens // 2
        return self.held_tokens * (kept + query * b + log_sum_exp) + seen * 2 * key * b

    def _mlp(self) -> int:
        """mlp.py: the input; gate and up; silu(gate), up with an offset of 0 added, and the product."""
        width = self.shapes.mlp // self.parallel.tensor
        return self.layer_input() + self.held_tokens * 5 * width * self.element_bytes

    def _experts(self, *, selective: bool) -> int:
        shapes, b = self.shapes, self.element_bytes
        # router.py, moe_utils.py: the input; chosen experts and scores; the map of routes; probabilities; the order.
        routes = shapes.top_k * (2 * INT64 + FLOAT32) + shapes.experts * (1 + FLOAT32)
        # experts.py: the rows; gate and up; then silu(gate), silu(gate)·up and the activation, or none of these; gates.
        width = shapes.expert_width // self.parallel.expert_tensor_size
        row = shapes.hidden * b + (2 if selective else 5) * width * b + FLOAT32
        return self.layer_input() + self.sequence_tokens * routes + self.expert_rows * row


def micro_batches_in_flight(parallel: ParallelSection, stage: int, num_micro_batches: int) -> int:
    """Chunks whose activations a stage holds at once (Megatron's schedules.py, get_pp_rank_microbatches: warm-up + 1)."""
    if parallel.pipeline == 1:
        return 1
    chunks = parallel.virtual_pipeline or 1
    if chunks == 1:
        warm_up = parallel.pipeline - stage - 1
    else:
        warm_up = 2 * (parallel.pipeline - stage - 1) + (chunks - 1) * parallel.pipeline
    return min(warm_up + 1, num_micro_batches * chunks)
