"""What SGLang answers: decoded exactly, and never taken for what it is not."""

from __future__ import annotations

import base64
import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

from megatron_gspo.rollout.sglang_http import ServerFaultError
from megatron_gspo.rollout.sglang_response import (
    Expected,
    NothingSampledError,
    ResponseSchemaError,
    RoutesShape,
    StaleWeightsError,
    decode_answer,
    dense_layers,
    request_body,
)
from megatron_gspo.types import Prompt, SamplingSettings, TrainingFailedError, UserError

PROMPT = Prompt(id="test:0", token_ids=(4, 5, 6), text="", answer="")
SETTINGS = SamplingSettings(max_response_tokens=3, stop_token_ids=(1,))
SHAPE = RoutesShape(num_layers=3, num_experts=8, top_k=2)
EXPECTED = Expected(weight_label="run.4", weight_version=4, routes=SHAPE, sglang_version="0.5.99")


def encoded(routes: np.ndarray) -> str:
    return base64.b64encode(routes.astype("<i4").tobytes()).decode()


def answer() -> dict[str, Any]:
    routes = np.arange(4 * 3 * 2).reshape(4, 3, 2) % 8
    return {
        "output_ids": [9, 1],
        "meta_info": {
            "finish_reason": {"type": "stop", "matched": 1},
            "weight_version": "run.4",
            "weight_versions": [{"version": "run.4", "start": 0, "end": 2}],
            "output_token_logprobs": [[-0.5, 9, None], [-0.25, 1, None]],
            "routed_experts": encoded(routes),
        },
    }


def changed(**meta: Any) -> dict[str, Any]:
    return {"output_ids": answer()["output_ids"], "meta_info": answer()["meta_info"] | meta}


def test_an_answer_becomes_the_response_it_describes():
    response = decode_answer(answer(), PROMPT, SETTINGS, EXPECTED)
    assert response.token_ids.tolist() == [9, 1]
    assert response.log_probs.tolist() == [-0.5, -0.25]
    assert (response.finish_reason, response.weight_version, response.prompt_id) == ("stop", 4, "test:0")
    routes = np.arange(4 * 3 * 2).reshape(4, 3, 2) % 8
    np.testing.assert_array_equal(response.routed_experts, routes)
    assert response.routed_experts.dtype == np.uint8


@given(st.data())
def test_routes_survive_the_wire(data: st.DataObject):
    num_layers, num_tokens = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    num_experts = data.draw(st.sampled_from([2, 256, 257, 512]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    routes = rng.integers(0, num_experts, (num_tokens, num_layers, 2))
    routes[0, 0, 0] = num_experts - 1
    decoded = RoutesShape(num_layers, num_experts, 2).decode(encoded(routes), num_tokens)
    assert decoded.dtype == (np.uint8 if num_experts <= 256 else np.uint16)
    np.testing.assert_array_equal(decoded, routes)


@pytest.mark.parametrize(
    ("changes", "dense"),
    [
        ({}, []),
        ({"mlp_only_layers": [1]}, [1]),
        ({"decoder_sparse_step": 2}, [0, 2]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, [0, 2, 3]),
    ],
)
def test_dense_layers_are_those_that_transformers_builds_dense(changes: dict[str, Any], dense: list[int]):
    config = Qwen3MoeConfig(num_hidden_layers=4, hidden_size=32, head_dim=8, num_experts=300, **changes)
    assert dense_layers(config.to_dict()) == dense
    assert RoutesShape.of(config.to_dict()) == RoutesShape(4, 300, config.num_experts_per_tok)
    with torch.device("meta"):
        layers = [Qwen3MoeDecoderLayer(config, layer) for layer in range(4)]
    assert [index for index, layer in enumerate(layers) if not hasattr(layer.mlp, "experts")] == dense


def test_a_dense_model_has_no_routes_to_ask_for():
    with pytest.raises(UserError, match=r"routing\.replay: r3 .* no MoE layer"):
        RoutesShape.of({"model_type": "qwen3", "num_hidden_layers": 2})


@pytest.mark.parametrize(
    "key", ["weight_version", "weight_versions", "finish_reason", "output_token_logprobs", "routed_experts"]
)
def test_a_missing_key_is_named_with_the_release_that_left_it_out(key: str):
    incomplete = copy.deepcopy(answer())
    del incomplete["meta_info"][key]
    with pytest.raises(
        ResponseSchemaError, match=rf"SGLang 0\.5\.99 answered without {key}; .* as SGLang 0\.5\.21 does"
    ):
        decode_answer(incomplete, PROMPT, SETTINGS, EXPECTED)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ([1, 2], "a mapping with meta_info"),
        (changed(finish_reason={"type": "tired"}), "finish_reason.type = 'tired'; expected stop or length or abort"),
        (changed(output_token_logprobs=[[None, 9, None], [-0.25, 1, None]]), "output_token_logprobs"),
        (changed(output_token_logprobs=[[-0.5, 9, None]]), "the ids of meta_info.output_token_logprobs"),
        (
            changed(output_token_logprobs=[[-0.5, 8, None], [-0.25, 1, None]]),
            "the ids of meta_info.output_token_logprobs",
        ),
        (changed(finish_reason={"type": "length"}), "2 tokens.*expected 3, by finish_reason"),
        (changed(routed_experts=encoded(np.zeros((5, 3, 2)))), "30 entries, expected 24"),
        (changed(routed_experts=encoded(np.full((4, 3, 2), 8))), "experts 8 to 8, expected 0 to 7"),
        (changed(routed_experts="not base64"), "not base64 of int32"),
    ],
)
def test_an_answer_that_is_not_what_it_should_be_is_an_error(wrong: Any, words: str):
    with pytest.raises(ResponseSchemaError, match=words):
        decode_answer(wrong, PROMPT, SETTINGS, EXPECTED)


def test_a_response_that_other_weights_sampled_in_part_is_stale():
    spans = [{"version": "run.3", "start": 0, "end": 1}, {"version": "run.4", "start": 1, "end": 2}]
    for stale in (changed(weight_version="default"), changed(weight_versions=spans)):
        with pytest.raises(StaleWeightsError, match=r"expected run\.4"):
            decode_answer(stale, PROMPT, SETTINGS, EXPECTED)


def test_an_aborted_response_is_sampled_anew_rather_than_taken():
    with pytest.raises(ServerFaultError, match="aborted"):
        decode_answer(changed(finish_reason={"type": "abort", "message": "…"}), PROMPT, SETTINGS, EXPECTED)


def test_a_response_ended_by_a_token_that_is_no_stop_token_names_the_configuration():
    with pytest.raises(TrainingFailedError, match=r"ended a response at token 1, .* eos_token_id"):
        decode_answer(answer(), PROMPT, SamplingSettings(max_response_tokens=3, stop_token_ids=(2,)), EXPECTED)


def test_the_end_of_sequence_is_ignored_only_where_nothing_stops_a_response():
    sampling = request_body(PROMPT, SETTINGS, return_routed_experts=True)["sampling_params"]
    assert (sampling["stop_token_ids"], sampling["ignore_eos"], sampling["top_k"]) == ([1], False, -1)
    sampling = request_body(PROMPT, SamplingSettings(5, top_k=7), return_routed_experts=False)["sampling_params"]
    assert (sampling["stop_token_ids"], sampling["ignore_eos"], sampling["top_k"]) == ([], True, 7)


def test_the_rest_of_a_response_is_asked_for_by_its_tokens_and_joined_to_them():
    routes = np.arange(3 * 3 * 2).reshape(3, 3, 2) % 8
    called_off = changed(finish_reason={"type": "abort"}, routed_experts=encoded(routes))
    called_off = {
        "output_ids": [9],
        "meta_info": called_off["meta_info"] | {"output_token_logprobs": [[-0.5, 9, None]]},
    }
    so_far = decode_answer(called_off, PROMPT, SETTINGS, EXPECTED, is_called_off=True)
    assert (so_far.finish_reason, so_far.token_ids.tolist()) == ("abort", [9])
    body = request_body(PROMPT, SETTINGS, return_routed_experts=True, so_far=so_far, request_id="one")
    assert (body["input_ids"], body["sampling_params"]["max_new_tokens"], body["rid"]) == ([4, 5, 6, 9], 2, "one")

    newer = Expected(weight_label="run.5", weight_version=5, routes=SHAPE, sglang_version="0.5.99")
    all_routes = 7 - np.arange(5 * 3 * 2).reshape(5, 3, 2) % 8
    rest = changed(weight_version="run.5", weight_versions=[], routed_experts=encoded(all_routes))
    response = decode_answer(rest, PROMPT, SETTINGS, newer, so_far=so_far)
    assert response.token_ids.tolist() == [9, 9, 1]
    assert response.log_probs.tolist() == [-0.5, -0.5, -0.25]
    assert response.token_versions.tolist() == [4, 5, 5]
    np.testing.assert_array_equal(response.routed_experts, np.concatenate([routes, all_routes[3:]]))


@pytest.mark.parametrize(("max_tokens", "stop", "reason"), [(3, 1, "stop"), (2, 2, "length"), (3, 2, "abort")])
def test_called_off_at_its_last_token_a_response_has_ended_all_the_same(max_tokens: int, stop: int, reason: str):
    called_off = changed(finish_reason={"type": "abort"})
    settings = SamplingSettings(max_response_tokens=max_tokens, stop_token_ids=(stop,))
    assert decode_answer(called_off, PROMPT, settings, EXPECTED, is_called_off=True).finish_reason == reason


def test_a_response_that_was_called_off_in_the_queue_has_not_begun():
    queued = {"output_ids": [], "meta_info": {"finish_reason": {"type": "abort"}, "weight_version": "run.4"}}
    with pytest.raises(NothingSampledError):
        decode_answer(queued, PROMPT, SETTINGS, EXPECTED, is_called_off=True)
    without_routes = changed(finish_reason={"type": "abort"})
    del without_routes["meta_info"]["routed_experts"]
    with pytest.raises(NothingSampledError):
        decode_answer(without_routes, PROMPT, SETTINGS, EXPECTED, is_called_off=True)
