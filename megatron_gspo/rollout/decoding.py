"""One batch of responses: prompts are read once, then every step samples a token for each unfinished response.

In: a Transformers model and token ids. Out: sampled token ids with their log-probs and, if asked, the experts that each
token was routed to. All responses of a batch start at the same column, because prompts are padded on the left; a finished
response leaves the batch together with its rows of the key-value cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from megatron_gspo.rollout.kv_cache import GrowingCache
from megatron_gspo.rollout.sampling import choose_tokens, draw_uniforms
from megatron_gspo.types import FinishReason, SamplingSettings

# Share of the rows that must have finished before the others move into a smaller batch. Moving costs about what
# attention costs in one step, so an eighth is repaid within eight steps.
_FINISHED_SHARE_TO_LEAVE = 1 / 8


_ENDINGS: tuple[FinishReason, ...] = ("abort", "length", "stop")


@dataclass(frozen=True)
class SampledTokens:
    """One response of a batch."""

    token_ids: np.ndarray  # [tokens] int64
    log_probs: np.ndarray  # [tokens] float32
    finish_reason: FinishReason  # "abort" where `enough` ended the batch first
    routed_experts: np.ndarray | None = None  # [prompt + tokens - 1, L, K] uint8 up to 256 experts, uint16 above


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    prompt_of_response: Sequence[int],
    settings: SamplingSettings,
    generator: torch.Generator,
    routers: Sequence[Qwen3MoeTopKRouter] = (),
    *,
    num_tokens_before: Sequence[int] | None = None,
    enough: Callable[[np.ndarray], bool] | None = None,
) -> list[SampledTokens]:
    """Sample one response for each entry of `prompt_of_response`, an index into `prompts`.

    Args:
        prompts: token ids, at least one each.
        generator: a CPU generator; the batch takes a fixed number of draws from it, whatever is sampled.
        routers: the model's L routers, in depth order, to return the routes of each response; none to do without.
        num_tokens_before: tokens of each response that its prompt here ends with already, sampled before; default none.
        enough: whether to end the batch, given which responses have ended, [responses] bool; asked after each token.
            Default: when all have.
    """
    uniforms = draw_uniforms(len(prompt_of_response), settings, generator).to(model.device)
    stop_token_ids = torch.tensor(settings.stop_token_ids, dtype=torch.int64, device=model.device)
    before = torch.tensor(num_tokens_before or [0] * len(prompt_of_response), device=model.device)
    record = _Record.of(len(prompt_of_response), settings.max_response_tokens, model.device)
    with _Routes(routers, len(prompt_of_response), settings.max_response_tokens) as routes:
        rows, logits = _read_prompts(model, prompts, prompt_of_response, settings.max_response_tokens)
        routes.end_prompts(len(prompts))
        for step in range(settings.max_response_tokens):
            # Finished rows are sampled along; their places in the draws may lie beyond the last.
            places = (before[rows.responses] + step).clamp(max=settings.max_response_tokens - 1)
            tokens, log_probs = choose_tokens(logits, uniforms[rows.responses, places], settings)
            record.add(rows, step, tokens, log_probs, torch.isin(tokens, stop_token_ids), places)
            num_finished = int(rows.finished.sum())
            if num_finished == len(tokens) or (enough is not None and enough(record.has_ended())):
                break
            if num_finished >= _FINISHED_SHARE_TO_LEAVE * len(tokens):
                unfinished = (~rows.finished).nonzero().squeeze(1)
                rows, tokens = rows.select(unfinished), tokens[unfinished]
            logits = rows.forward(model, tokens, step)
            routes.end_step(rows.responses, step)
    sampled = record.responses()
    if not routers:
        return sampled
    return [
        replace(tokens, routed_experts=routes.of_response(index, len(tokens.token_ids), prompt, len(prompts[prompt])))
        for index, (tokens, prompt) in enumerate(zip(sampled, prompt_of_response, strict=True))
    ]


@dataclass
class _Record:
    """What has been sampled, [responses, max_response_tokens]; entries after a response's end mean nothing."""

    token_ids: Tensor  # int64
    log_probs: Tensor  # float32
    num_tokens: Tensor  # [responses] int64, sampled so far
    endings: Tensor  # [responses] int64 into `_ENDINGS`

    @classmethod
    def of(cls, num_responses: int, max_response_tokens: int, device: torch.device) -> _Record:
        shape = (num_responses, max_response_tokens)
        return cls(
            torch.zeros(shape, dtype=torch.int64, device=device),
            torch.zeros(shape, dtype=torch.float32, device=device),
            torch.zeros(num_responses, dtype=torch.int64, device=device),
            torch.zeros(num_responses, dtype=torch.int64, device=device),
        )

    def add(self, rows: _Rows, step: int, tokens: Tensor, log_probs: Tensor, stops: Tensor, places: Tensor) -> None:
        """Note a token for each row, and which rows end with it; `places` [rows] are its places in the response."""
        self.token_ids[rows.responses, step] = tokens
        self.log_probs[rows.responses, step] = log_probs
        unfinished = ~rows.finished
        self.num_tokens[rows.responses[unfinished]] = step + 1
        is_last = places + 1 == self.token_ids.shape[1]
        self.endings[rows.responses[unfinished & is_last]] = _ENDINGS.index("length")
        self.endings[rows.responses[unfinished & stops]] = _ENDINGS.index("stop")
        rows.finished |= stops | is_last

    def has_ended(self) -> np.ndarray:
        """Which responses have come to their end: [responses] bool."""
        return (self.endings > 0).cpu().numpy()

    def responses(self) -> list[SampledTokens]:
        token_ids, log_probs = self.token_ids.cpu().numpy(), self.log_probs.cpu().numpy()
        return [
            SampledTokens(token_ids[i, :length].copy(), log_probs[i, :length].copy(), _ENDINGS[ending])
            for i, (length, ending) in enumerate(zip(self.num_tokens.tolist(), self.endings.tolist(), strict=True))
        ]


class _Routes:
    """What the routers chose in one batch: forward hooks, which exist within the `with` block, collect each forward pass.

    Every row of a pass is kept, those of padding and of finished responses too; `of_response` reads what counts. Without
    routers nothing is hooked or kept.
    """

    _of_prompts: np.ndarray  # [prompts, prompt width, L, K], on the host like the next
    _of_steps: np.ndarray  # [responses, max_response_tokens - 1, L, K]; the last token is never fed back, so not routed

    def __init__(self, routers: Sequence[Qwen3MoeTopKRouter], num_responses: int, max_response_tokens: int) -> None:
        self._routers = routers
        self._handles: list[RemovableHandle] = []
        self._chosen: list[Tensor] = []  # one [rows × columns, K] a router, of the forward pass under way
        if not routers:
            return
        num_experts, top_k = routers[0].num_experts, routers[0].top_k
        self._dtype = torch.uint8 if num_experts <= 256 else torch.uint16
        # As long as the longest response may become; its pages take no memory before they are written.
        shape = (num_responses, max_response_tokens - 1, len(routers), top_k)
        self._of_steps = torch.empty(shape, dtype=self._dtype).numpy()

    def __enter__(self) -> _Routes:
        self._handles = [router.register_forward_hook(self._collect) for router in self._routers]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def end_prompts(self, num_prompts: int) -> None:
        """The forward pass over `num_prompts` padded prompts is complete."""
        if self._routers:
            routes = self._end_pass()
            self._of_prompts = routes.reshape(num_prompts, -1, *routes.shape[1:])

    def end_step(self, responses: Tensor, step: int) -> None:
        """The forward pass over the tokens that `responses` [rows] sampled at `step` is complete."""
        if self._routers:
            self._of_steps[responses.cpu().numpy(), step] = self._end_pass()

    def of_response(self, response: int, num_tokens: int, prompt: int, num_prompt_tokens: int) -> np.ndarray:
        """[prompt + tokens - 1, L, K]: the prompt's routes, without its padding on the left, then the response's."""
        width = self._of_prompts.shape[1]
        of_prompt = self._of_prompts[prompt, width - num_prompt_tokens :]
        return np.concatenate([of_prompt, self._of_steps[response, : num_tokens - 1]])

    def _collect(self, router: nn.Module, inputs: object, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        # A router of Transformers 5.23 returns logits, gate values and the indices that its layer hands to the experts.
        self._chosen.append(outputs[2].to(self._dtype))

    def _end_pass(self) -> np.ndarray:
        """[rows × columns, L, K]: what the routers chose since the last call."""
        assert len(self._chosen) == len(self._routers), "each router is called once a forward pass"
        routes = torch.stack(self._chosen, dim=1)
        self._chosen.clear()
        return routes.cpu().numpy()


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
