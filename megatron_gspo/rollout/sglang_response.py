"""What SGLang answers to `/generate`, checked and decoded.

In: the JSON of one answer, the prompt and settings it was asked with. Out: a `Response`, or an error that says which key
is not what was expected, and which SGLang release said it. No network here.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from megatron_gspo.rollout.open_groups import joined
from megatron_gspo.rollout.sglang_http import ServerFaultError
from megatron_gspo.types import FinishReason, Prompt, Response, SamplingSettings, TrainingFailedError, UserError

SUPPORTED_VERSION = "0.5.21"


class ResponseSchemaError(TrainingFailedError):
    """A server's answer is not what this version of the program reads."""


class StaleWeightsError(Exception):
    """A response was sampled by other weights than the current ones."""


class NothingSampledError(Exception):
    """A response was called off before its first token, or its tokens did not come back whole."""


@dataclass(frozen=True)
class RoutesShape:
    """What SGLang's routed experts of a model look like."""

    num_layers: int  # decoder layers; all are MoE layers, as `dense_layers` makes sure
    num_experts: int
    top_k: int

    @classmethod
    def of(cls, hf_config: Mapping[str, Any]) -> RoutesShape:
        """Of a Qwen3-MoE model's config.json.

        Raises:
            UserError: the model has no MoE layer.
        """
        if hf_config.get("model_type") != "qwen3_moe":
            raise UserError(
                "routing.replay: r3 replays the rollout engine's routes, and the model has no MoE layer to route in; "
                "accepted: off, or a qwen3_moe model"
            )
        return cls(
            num_layers=int(hf_config["num_hidden_layers"]),
            # Transformers 5 writes the number of experts under another name than the checkpoints it reads.
            num_experts=int(hf_config["num_experts"] if "num_experts" in hf_config else hf_config["num_local_experts"]),
            top_k=int(hf_config["num_experts_per_tok"]),
        )

    def decode(self, text: str, num_tokens: int) -> np.ndarray:
        """Routes [num_tokens, L, K] in uint8 up to 256 experts, uint16 above.

        Args:
            text: base64 of int32 [num_tokens, L, K].
            num_tokens: prompt + response - 1; the last token was never run through the model.

        Raises:
            ValueError: saying what does not fit.
        """
        try:
            flat = np.frombuffer(base64.b64decode(text, validate=True), dtype="<i4")
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"not base64 of int32 ({error})") from error
        shape = (num_tokens, self.num_layers, self.top_k)
        if flat.size != np.prod(shape):
            raise ValueError(f"{flat.size} entries, expected {np.prod(shape)} (tokens, layers, experts: {list(shape)})")
        routes = flat.reshape(shape)
        if routes.size and not 0 <= routes.min() <= routes.max() < self.num_experts:
            raise ValueError(f"experts {routes.min()} to {routes.max()}, expected 0 to {self.num_experts - 1}")
        return routes.astype(np.uint8 if self.num_experts <= 256 else np.uint16)


def dense_layers(hf_config: Mapping[str, Any]) -> list[int]:
    """Layers of a Qwen3-MoE model that are dense, from 0, by the rule of Transformers' Qwen3MoeDecoderLayer.

    SGLang 0.5.21 builds experts in every layer whatever the configuration says (srt/models/qwen3_moe.py,
    `is_layer_sparse = True`) and loads a dense layer's weights nowhere, in silence.
    """
    named, step = set(hf_config.get("mlp_only_layers") or ()), int(hf_config.get("decoder_sparse_step", 1))
    return [layer for layer in range(int(hf_config["num_hidden_layers"])) if layer in named or (layer + 1) % step]


@dataclass(frozen=True)
class Expected:
    """What an answer is checked against."""

    weight_label: str  # as the servers name the current weights
    weight_version: int
    routes: RoutesShape | None  # None where none were asked for
    sglang_version: str = SUPPORTED_VERSION  # what the server said it is, for errors


def request_body(
    prompt: Prompt,
    settings: SamplingSettings,
    *,
    return_routed_experts: bool,
    so_far: Response | None = None,
    request_id: str | None = None,
) -> dict[str, Any]:
    """The body of a `/generate` request for one response, or for the rest of one whose tokens `so_far` were sampled before.

    `request_id` is what the request can be called off by.
    """
    known = [] if so_far is None else so_far.token_ids.tolist()
    named = {} if request_id is None else {"rid": request_id}
    return named | {
        "input_ids": [*prompt.token_ids, *known],
        "sampling_params": {
            "max_new_tokens": settings.max_response_tokens - len(known),
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k or -1,
            "stop_token_ids": list(settings.stop_token_ids),
            # Also switches `stop_token_ids` off (srt/managers/schedule_batch.py), so only where there are none.
            "ignore_eos": not settings.stop_token_ids,
        },
        "return_logprob": True,
        "return_routed_experts": return_routed_experts,
        "stream": False,
    }


def decode_answer(
    answer: Any,
    prompt: Prompt,
    settings: SamplingSettings,
    expected: Expected,
    *,
    so_far: Response | None = None,
    is_called_off: bool = False,
) -> Response:
    """The response in an answer, behind its tokens `so_far`; one that `is_called_off` may end anywhere ("abort").

    Raises:
        StaleWeightsError: other weights sampled it, or any token of it.
        NothingSampledError: it was called off and has no tokens, or not what belongs to them.
        ServerFaultError: the server gave up before the response's end, and was not asked to.
        ResponseSchemaError: a key is missing or not what it should be.
    """
    read = _Reader(expected.sglang_version)
    meta = read.mapping(answer, "meta_info")
    finish_reason = read.text(read.mapping(meta, "finish_reason"), "type")
    if finish_reason not in get_args(FinishReason):
        raise read.error("meta_info.finish_reason.type", finish_reason, " or ".join(get_args(FinishReason)))
    if finish_reason == "abort":
        if not is_called_off:
            raise ServerFaultError(f"a response was aborted: {meta['finish_reason']}")
        # Called off in the server's queue, an answer has neither routes nor, mostly, tokens.
        if not answer.get("output_ids") or (expected.routes is not None and not meta.get("routed_experts")):
            raise NothingSampledError
    labels = {read.text(meta, "weight_version")}
    labels |= {read.text(span, "version") for span in read.items(meta, "weight_versions")}
    if labels != {expected.weight_label}:
        raise StaleWeightsError(f"sampled by weights {sorted(labels)}, expected {expected.weight_label}")
    token_ids, log_probs = read.sampled_tokens(answer, meta)
    num_known = 0 if so_far is None else len(so_far.token_ids)
    num_tokens = len(prompt.token_ids) + num_known + len(token_ids)
    sampled = Response(
        prompt_id=prompt.id,
        token_ids=token_ids,
        log_probs=log_probs,
        finish_reason=_checked_end(read, finish_reason, token_ids, num_known, settings),
        weight_version=expected.weight_version,
        routed_experts=read.routes(meta, expected.routes, num_tokens - 1),
    )
    return joined(so_far, sampled, len(prompt.token_ids))


def _checked_end(
    read: _Reader, finish_reason: str, token_ids: np.ndarray, num_known: int, settings: SamplingSettings
) -> FinishReason:
    ends_with_stop, num_sampled = token_ids[-1] in settings.stop_token_ids, num_known + len(token_ids)
    if finish_reason == "abort":
        # Called off at its last token, a response has come to its end all the same.
        return "stop" if ends_with_stop else "length" if num_sampled == settings.max_response_tokens else "abort"
    if finish_reason == "stop":
        if not ends_with_stop:
            raise TrainingFailedError(
                f"the SGLang server ended a response at token {token_ids[-1]}, which is no stop token of the run "
                f"({list(settings.stop_token_ids)}): the eos_token_id in the model's config.json is not its tokenizer's"
            )
        return "stop"
    if num_sampled != settings.max_response_tokens:
        raise read.error("output_ids", f"{num_sampled} tokens", f"{settings.max_response_tokens}, by finish_reason")
    return "length"


class _Reader:
    """Reads keys of an answer, and says what was wrong with one."""

    def __init__(self, sglang_version: str) -> None:
        self._version = sglang_version

    def error(self, key: str, found: object, expected: str) -> ResponseSchemaError:
        shown = repr(found)
        shown = shown if len(shown) <= 100 else f"{shown[:100]}…"
        return ResponseSchemaError(
            f"SGLang {self._version} answered with {key} = {shown}; expected {expected}, as SGLang {SUPPORTED_VERSION} does"
        )

    def value(self, container: Any, key: str) -> Any:
        if not isinstance(container, dict):
            raise self.error("an answer", container, f"a mapping with {key}")
        if key not in container:
            raise ResponseSchemaError(
                f"SGLang {self._version} answered without {key}; expected it, as SGLang {SUPPORTED_VERSION} does; there are "
                f"{', '.join(map(str, container))}"
            )
        return container[key]

    def mapping(self, container: Any, key: str) -> dict[str, Any]:
        found = self.value(container, key)
        if not isinstance(found, dict):
            raise self.error(key, found, "a mapping")
        return found

    def items(self, container: Any, key: str) -> list[Any]:
        found = self.value(container, key)
        if not isinstance(found, list):
            raise self.error(key, found, "a list")
        return found

    def text(self, container: Any, key: str) -> str:
        found = self.value(container, key)
        if not isinstance(found, str):
            raise self.error(key, found, "text")
        return found

    def sampled_tokens(self, answer: Any, meta: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [tokens] int64 and their log-probs [tokens] float32."""
        token_ids, entries = self.items(answer, "output_ids"), self.items(meta, "output_token_logprobs")
        for entry in entries:
            is_pair = isinstance(entry, list) and len(entry) >= 2
            if not is_pair or type(entry[0]) is not float or type(entry[1]) is not int:
                raise self.error("an entry of meta_info.output_token_logprobs", entry, "[log-prob, token id, …]")
        if not entries or [entry[1] for entry in entries] != token_ids:
            raise self.error("output_ids", token_ids, "at least one, and the ids of meta_info.output_token_logprobs")
        return np.array(token_ids, dtype=np.int64), np.array([entry[0] for entry in entries], dtype=np.float32)

    def routes(self, meta: dict[str, Any], shape: RoutesShape | None, num_tokens: int) -> np.ndarray | None:
        if shape is None:
            return None
        try:
            return shape.decode(self.text(meta, "routed_experts"), num_tokens)
        except ValueError as error:
            raise ResponseSchemaError(
                f"SGLang {self._version} answered with meta_info.routed_experts of {error}; SGLang {SUPPORTED_VERSION} "
                "gives base64 of int32 [prompt + response - 1, layers, experts]"
            ) from error
