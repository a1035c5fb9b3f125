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

from megatron_gspo.context_parallel import ContextShare, pad_multiples
from megatron_gspo.model.attention import PackedSegments
from megatron_gspo.model.context_attention import ContextChunks
from megatron_gspo.model.context_gather import tokens_of_all_ranks
from megatron_gspo.model.log_probs import token_log_probs
from megatron_gspo.model.rotary import RotaryInAttention, RotaryTable
from megatron_gspo.types import MicroBatch


class TokenLogProbs(NamedTuple):
    """What the policy says about a micro-batch's response tokens, in packing order."""

    log_probs: Tensor  # [T] float32, with gradient
    entropy: Tensor | None  # [T] float32, with gradient; None where it was not asked for


class PolicyModel(GPTModel):
    """One chunk of the policy on this rank."""

    def __init__(self, *, log_probs_chunk_tokens: int, rotary_in_attention: bool, **options: Any) -> None:
        super().__init__(position_embedding_type="rope", parallel_output=True, **options)
        self.log_probs_chunk_tokens = log_probs_chunk_tokens
        if rotary_in_attention:  # Transformer Engine's attention is given queries and keys that Megatron has rotated
            self.rotary_pos_emb = RotaryInAttention(
                self.config.kv_channels,
                rotary_percent=1.0,
                rotary_base=self.rotary_base,
                cp_group=self.pg_collection.cp,
            )

    def forward(
        self, micro_batch: MicroBatch, *, temperature: float = 1.0, with_entropy: bool = True
    ) -> TokenLogProbs | Tensor:
        """Log-probs of the response tokens at `temperature`, or hidden states where another stage goes on.

        Args:
            micro_batch: padded as `context_parallel.pad_multiples` says. Every rank of a copy of the model passes the
                same one, whole.
            temperature: what the rollout engine divides logits by.
            with_entropy: also compute the entropy.

        Returns:
            `TokenLogProbs` on the last pipeline stage, of all response tokens on every rank; else the hidden states of
            the tokens held here, [S / context / tensor, 1, H].
        """
        hidden = self._final_hidden_states(micro_batch)
        if not self.post_process:
            return hidden
        hidden, positions, targets = (
            self._gather_sequence(hidden),
            micro_batch.predicting_positions,
            micro_batch.target_token_ids,
        )
        here = None
        if self._share.size > 1:
            here, positions = self._predicted_here(micro_batch)
            targets = targets[here]
        log_probs, entropy = token_log_probs(
            hidden[positions],
            self.output_weight(),
            targets,
            temperature=temperature,
            chunk_tokens=self.log_probs_chunk_tokens,
            tensor_parallel_group=self.pg_collection.tp if self.pg_collection.tp.size() > 1 else None,
            with_entropy=with_entropy,
        )
        if here is None:
            return TokenLogProbs(log_probs, entropy)
        num_tokens, group = len(micro_batch.target_token_ids), self.pg_collection.cp
        if entropy is None:
            return TokenLogProbs(tokens_of_all_ranks(log_probs, here, num_tokens, group), None)
        both = tokens_of_all_ranks(torch.stack([log_probs, entropy], dim=1), here, num_tokens, group)
        return TokenLogProbs(*both.unbind(1))

    def logits(self, micro_batch: MicroBatch) -> Tensor:
        """Logits at every position, [S, V]: for tests and diagnosis, without pipeline or context parallelism."""
        assert self.pre_process and self.post_process and self._share.size == 1, "logits are for a model in one piece"
        hidden = self._gather_sequence(self._final_hidden_states(micro_batch))
        shard = torch.nn.functional.linear(hidden, self.output_weight())
        return gather_from_tensor_model_parallel_region(shard, group=self.pg_collection.tp)

    def output_weight(self) -> Tensor:
        """This rank's rows of the output layer, [V / tensor, H]; with tied embeddings those of the embedding."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def _final_hidden_states(self, micro_batch: MicroBatch) -> Tensor:
        """What the layers of this chunk make of the tokens held here: [S / context / tensor, 1, H]."""
        num_tokens, num_segments = len(micro_batch.token_ids), len(micro_batch.segment_cu_seqlens) - 1
        tensor, context = self.config.tensor_model_parallel_size, self._share.size
        assert num_tokens % pad_multiples(tensor, context)[1] == 0, "ranks hold equal parts"
        own = self._share.positions(micro_batch.segment_cu_seqlens, num_tokens)
        position_ids = micro_batch.position_ids[own]
        rotary = None
        if isinstance(self.rotary_pos_emb, RotaryInAttention):
            rotary = RotaryTable.of(position_ids, self.rotary_pos_emb.inv_freq, self.config.params_dtype)
        # Megatron (rope_utils.py) takes one table of S positions for a table of all segments' own positions, end to end.
        assert num_segments == 1 or micro_batch.max_segment_tokens < num_tokens, "max_segment_tokens must be exact"
        return super().forward(
            input_ids=micro_batch.token_ids[own].unsqueeze(0),
            position_ids=position_ids.unsqueeze(0),
            attention_mask=None,
            packed_seq_params=PackedSegments.of(
                micro_batch.segment_cu_seqlens,
                micro_batch.max_segment_tokens,
                None if self._share.size == 1 else ContextChunks.of(micro_batch, self._share),
                rotary,
            ),
        )

    @property
    def _share(self) -> ContextShare:
        """What this rank holds of every micro-batch."""
        return ContextShare(self.pg_collection.cp.rank(), self.pg_collection.cp.size())

    def _predicted_here(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Which of the T response tokens are predicted by a token held here, and where that is among those held."""
        num_tokens = len(micro_batch.token_ids)
        own = self._share.positions(micro_batch.segment_cu_seqlens, num_tokens)
        place = torch.full((num_tokens,), -1, device=own.device)
        place[own] = torch.arange(len(own), device=own.device)
        predicting = place[micro_batch.predicting_positions]
        here = (predicting >= 0).nonzero().squeeze(1)
        return here, predicting[here]

    def _postprocess(self, hidden_states: Tensor, **inputs: object) -> Tensor:
        """Where GPTModel would compute all logits: keep the hidden states."""
        del inputs
        return hidden_states

    def _gather_sequence(self, hidden: Tensor) -> Tensor:
        """[S / context / tensor, 1, H] of every tensor-parallel rank to [S / context, H] on all of them.

        Each rank's gradient is what its part of the vocabulary contributes; the gather's backward sums them.
        """
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.pg_collection.tp)
        return hidden.squeeze(1)
