"""One batch of responses: prompts are read once, then every step samples a token for each unfinished response.

In: a Transformers model and token ids. Out: sampled token ids with their log-probs. All responses of a batch start at the
same column, because prompts are padded on the left; a finished response leaves the batch together with its rows of the
key-value cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_gspo.rollout.kv_cache import GrowingCache
from megatron_gspo.rollout.sampling import choose_tokens, draw_uniforms
from megatron_gspo.types import SamplingSettings

# Share of the rows that must have finished before the others move into a smaller batch. Moving costs about what
# attention costs in one step, so an eighth is repaid within eight steps.
_FINISHED_SHARE_TO_LEAVE = 1 / 8


@dataclass(frozen=True)
class SampledTokens:
    """One response of a batch."""

    token_ids: np.ndarray  # [tokens] int64
    log_probs: np.ndarray  # [tokens] float32
    stopped: bool  # whether the last token is a stop token


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    prompt_of_response: Sequence[int],
    settings: SamplingSettings,
    generator: torch.Generator,
) -> list[SampledTokens]:
    """Sample one response for each entry of `prompt_of_response`, an index into `prompts`.

    Args:
        prompts: token ids, at least one each.
        generator: a CPU generator; the batch takes a fixed number of draws from it, whatever is sampled.
    """
    uniforms = draw_uniforms(len(prompt_of_response), settings, generator).to(model.device)
    stop_token_ids = torch.tensor(settings.stop_token_ids, dtype=torch.int64, device=model.device)
    record = _Record.of(len(prompt_of_response), settings.max_response_tokens, model.device)
    rows, logits = _read_prompts(model, prompts, prompt_of_response, settings.max_response_tokens)
    for step in range(settings.max_response_tokens):
        tokens, log_probs = choose_tokens(logits, uniforms[rows.responses, step], settings)
        record.token_ids[rows.responses, step] = tokens
        record.log_probs[rows.responses, step] = log_probs
        stopped = torch.isin(tokens, stop_token_ids) & ~rows.finished
        record.stop_steps.index_put_((rows.responses[stopped],), torch.tensor(step, device=model.device))
        rows.finished |= stopped
        num_finished = int(rows.finished.sum())
        if num_finished == len(tokens) or step + 1 == settings.max_response_tokens:
            break
        if num_finished >= _FINISHED_SHARE_TO_LEAVE * len(tokens):
            unfinished = (~rows.finished).nonzero().squeeze(1)
            rows, tokens = rows.select(unfinished), tokens[unfinished]
        logits = rows.forward(model, tokens, step)
    return record.responses()


@dataclass
class _Record:
    """What has been sampled, [responses, max_response_tokens]; entries after a response's end mean nothing."""

    token_ids: Tensor  # int64
    log_probs: Tensor  # float32
    stop_steps: Tensor  # [responses] int64, the step that sampled a stop token; the last step's successor without one

    @classmethod
    def of(cls, num_responses: int, max_response_tokens: int, device: torch.device) -> _Record:
        shape = (num_responses, max_response_tokens)
        return cls(
            torch.zeros(shape, dtype=torch.int64, device=device),
            torch.zeros(shape, dtype=torch.float32, device=device),
            torch.full((num_responses,), max_response_tokens, device=device),
        )

    def responses(self) -> list[SampledTokens]:
        token_ids, log_probs = self.token_ids.cpu().numpy(), self.log_probs.cpu().numpy()
        max_response_tokens = token_ids.shape[1]
        return [
            SampledTokens(token_ids[i, : stop + 1].copy(), log_probs[i, : stop + 1].copy(), stop < max_response_tokens)
            for i, stop in enumerate(self.stop_steps.tolist())
        ]


@dataclass
class _Rows:
    """The responses that are being decoded together, one a row."""

    responses: Tensor  # [rows] int64, each row's place in the batch
    finished: Tensor  # [rows] bool; a finished row is decoded along, unread, until enough others have finished
    prompt_lengths: Tensor  # [rows] int64
    padding_bias: Tensor  # [rows, 1, 1, prompt width + max_response_tokens], -inf where a prompt is padded, else 0
    cache: GrowingCache

    def select(self, kept: Tensor) -> _Rows:
        """These rows alone; the others' cache is freed."""
        self.cache.select_rows(kept)
        return _Rows(
            self.responses[kept], self.finished[kept], self.prompt_lengths[kept], self.padding_bias[kept], self.cache
        )

    def forward(self, model: PreTrainedModel, tokens: Tensor, step: int) -> Tensor:
        """Logits [rows, V] of the tokens after `tokens`, which were sampled at `step`.

        The mask is a view of one made for the whole batch, in the form the attention kernel takes: built by Transformers
        from a padding mask it costs anew at each step, and given as bool it is converted in each layer.
        """
        num_columns = self.cache.get_seq_length() + 1
        outputs = model(
            input_ids=tokens[:, None],
            attention_mask=self.padding_bias[..., :num_columns],
            position_ids=(self.prompt_lengths + step)[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        return outputs.logits[:, -1]


def _read_prompts(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], prompt_of_response: Sequence[int], num_columns_after: int
) -> tuple[_Rows, Tensor]:
    """Forward each prompt once, then give each response a row with its prompt's cache and next logits [rows, V]."""
    assert all(len(prompt) > 0 for prompt in prompts), "a prompt has at least one token"
    device = model.device
    width = max(len(prompt) for prompt in prompts)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    # Padding takes token 0; its column is masked, so which token it is does not matter.
    padded = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    first_columns = (width - lengths)[:, None]
    columns = torch.arange(width, device=device)
    cache = GrowingCache(model.config.num_hidden_layers)
    outputs = model(
        input_ids=padded,
        attention_mask=columns >= first_columns,
        position_ids=(columns - first_columns).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    padding = torch.arange(width + num_columns_after, device=device) < first_columns
    padding_bias = torch.zeros(padding.shape, dtype=model.dtype, device=device).masked_fill(padding, -torch.inf)
    prompt_rows = torch.tensor(prompt_of_response, device=device)
    cache.select_rows(prompt_rows)
    rows = _Rows(
        responses=torch.arange(len(prompt_rows), device=device),
        finished=torch.zeros(len(prompt_rows), dtype=torch.bool, device=device),
        prompt_lengths=lengths[prompt_rows],
        padding_bias=padding_bias[prompt_rows, None, None],
        cache=cache,
    )
    return rows, outputs.logits[prompt_rows, -1]
