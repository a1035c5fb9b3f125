"""The policy model: packed tokens in, log-probs of the response tokens out.

In: a `MicroBatch`. Out: on the last pipeline stage log π of every response token and the entropy there, which every
importance ratio (eqs. 3, 8, 15) is made of; on the others the hidden states for the next stage.

Megatron's GPTModel runs embedding, rotary positions and layers; only its end is replaced, so that the hidden states of
prompt tokens and padding never reach the output layer and no [tokens, vocabulary] matrix exists.

Shape legend: S packed tokens, T response tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from torch import Tensor

from megatron_gspo.model.attention import PackedSegments
from megatron_gspo.model.log_probs import token_log_probs
from megatron_gspo.types import MicroBatch


class TokenLogProbs(NamedTuple):
    """What the policy says about a micro-batch's response tokens, in packing order."""

    log_probs: Tensor  # [T] float32, with gradient
    entropy: Tensor | None  # [T] float32, with gradient; None where it was not asked for


class PolicyModel(GPTModel):
    """One chunk of the policy on this rank."""

    def __init__(self, *, log_probs_chunk_tokens: int, **options: Any) -> None:
        super().__init__(position_embedding_type="rope", parallel_output=True, **options)
        self.log_probs_chunk_tokens = log_probs_chunk_tokens

    def forward(
        self, micro_batch: MicroBatch, *, temperature: float = 1.0, with_entropy: bool = True
    ) -> TokenLogProbs | Tensor:
        """Log-probs of the response tokens at `temperature`, or hidden states where another stage goes on.

        Args:
            micro_batch: S must be a multiple of the tensor-parallel size. Every rank of a model-parallel group passes
                the same one.
            temperature: what the rollout engine divides logits by.
            with_entropy: also compute the entropy.

        Returns:
            `TokenLogProbs` on the last pipeline stage, else hidden states [S / tensor, 1, H].
        """
        hidden = self._final_hidden_states(micro_batch)
        if not self.post_process:
            return hidden
        return TokenLogProbs(
            *token_log_probs(
                self._gather_sequence(hidden)[micro_batch.predicting_positions],
                self.output_weight(),
                micro_batch.target_token_ids,
                temperature=temperature,
                chunk_tokens=self.log_probs_chunk_tokens,
                tensor_parallel_group=self.pg_collection.tp if self.pg_collection.tp.size() > 1 else None,
                with_entropy=with_entropy,
            )
        )

    def logits(self, micro_batch: MicroBatch) -> Tensor:
        """Logits at every position, [S, V]: for tests and diagnosis, without pipeline parallelism."""
        assert self.pre_process and self.post_process, "logits are for a model in one piece"
        hidden = self._gather_sequence(self._final_hidden_states(micro_batch))
        shard = torch.nn.functional.linear(hidden, self.output_weight())
        return gather_from_tensor_model_parallel_region(shard, group=self.pg_collection.tp)

    def output_weight(self) -> Tensor:
        """This rank's rows of the output layer, [V / tensor, H]; with tied embeddings those of the embedding."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def _final_hidden_states(self, micro_batch: MicroBatch) -> Tensor:
        """What the layers of this chunk make of the micro-batch: [S / tensor, 1, H]."""
        num_tokens, num_segments = len(micro_batch.token_ids), len(micro_batch.segment_cu_seqlens) - 1
        assert num_tokens % self.config.tensor_model_parallel_size == 0, "sequence parallelism cuts into equal parts"
        # Megatron (rope_utils.py) takes one table of S positions for a table of all segments' own positions, end to end.
        assert num_segments == 1 or micro_batch.max_segment_tokens < num_tokens, "max_segment_tokens must be exact"
        return super().forward(
            input_ids=micro_batch.token_ids.unsqueeze(0),
            position_ids=micro_batch.position_ids.unsqueeze(0),
            attention_mask=None,
            packed_seq_params=PackedSegments.of(micro_batch.segment_cu_seqlens, micro_batch.max_segment_tokens),
        )

    def _postprocess(self, hidden_states: Tensor, **inputs: object) -> Tensor:
        """Where GPTModel would compute all logits: keep the hidden states."""
        del inputs
        return hidden_states

    def _gather_sequence(self, hidden: Tensor) -> Tensor:
        """[S / tensor, 1, H] of every tensor-parallel rank to [S, H] on all of them.

        Each rank's gradient is what its part of the vocabulary contributes; the gather's backward sums them.
        """
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.pg_collection.tp)
        return hidden.squeeze(1)
