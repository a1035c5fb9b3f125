"""The routes that the local engine returns, held against the routers of the plain Transformers model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from megatron_gspo.rollout.decoding import decode
from megatron_gspo.rollout.local import LocalEngine
from megatron_gspo.types import Prompt, Response, SamplingSettings, UserError

DENSE = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.15,  # scores that differ by far more than the round-off between two ways to compute them
}
MOE = DENSE | {"moe_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True}
CONFIGS = {
    "every layer routed": MOE,
    "dense layer named": MOE | {"mlp_only_layers": [1]},
    "every second layer dense": MOE | {"decoder_sparse_step": 2, "num_experts_per_tok": 3},
}
MORE_EXPERTS_THAN_A_BYTE = MOE | {"num_hidden_layers": 2, "num_experts": 300}
PROMPTS = [
    Prompt(id=f"test:{index}", token_ids=token_ids, text="", answer="")
    for index, token_ids in enumerate([(3, 4, 5, 6, 7, 8, 9), (10,), (11, 12, 3), (4, 4, 17, 20)])
]
SAMPLING = SamplingSettings(max_response_tokens=12, temperature=0.7, stop_token_ids=(1, 2), seed=5)


def write_checkpoint(directory: Path, config: Qwen3Config | Qwen3MoeConfig) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: write_checkpoint(tmp_path_factory.mktemp("checkpoint"), Qwen3MoeConfig(**sizes))
        for name, sizes in CONFIGS.items()
    }


def engine_of(checkpoint: Path, **arguments: object) -> LocalEngine:
    engine = LocalEngine(checkpoint, **{"return_routed_experts": True} | arguments)
    engine.update_weights(load_file(checkpoint / "model.safetensors").items(), version=1)
    return engine


def pairs(groups: list[tuple[Response, ...]], prompts: list[Prompt]) -> list[tuple[Prompt, Response]]:
    return [(prompt, response) for prompt, group in zip(prompts, groups, strict=True) for response in group]


@torch.no_grad()
def expected_routes(model: PreTrainedModel, prompt: Prompt, response: Response) -> np.ndarray:
    """[prompt + response - 1, L, K]: what each router chose in one pass over the sequence alone, layer by layer."""
    chosen: list[torch.Tensor] = []
    handles = [
        layer.mlp.gate.register_forward_hook(lambda _, __, outputs: chosen.append(outputs[2]))
        for layer in model.model.layers
        if hasattr(layer.mlp, "gate")
    ]
    model(torch.tensor([[*prompt.token_ids, *response.token_ids.tolist()]]))
    for handle in handles:
        handle.remove()
    return torch.stack(chosen, dim=1)[:-1].numpy()


@pytest.mark.parametrize("max_concurrent_responses", [3, 256])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_routes_equal_those_of_a_full_forward_pass_whatever_shares_the_batch(
    name: str, max_concurrent_responses: int, checkpoints: dict[str, Path]
) -> None:
    engine = engine_of(checkpoints[name], max_concurrent_responses=max_concurrent_responses)
    reference = AutoModelForCausalLM.from_pretrained(checkpoints[name], dtype=torch.float32).eval()
    sampled = pairs(engine.generate(PROMPTS, 8, SAMPLING), PROMPTS)
    lengths = {len(response.token_ids) for _, response in sampled}
    assert len(lengths) > 4, "responses end at different steps, so rows left the batch in between"
    for prompt, response in sampled:
        np.testing.assert_array_equal(response.routed_experts, expected_routes(reference, prompt, response))


@pytest.mark.parametrize(
    ("name", "num_moe_layers", "top_k"),
    [("every layer routed", 4, 2), ("dense layer named", 3, 2), ("every second layer dense", 2, 3)],
)
def test_routes_have_an_entry_for_all_tokens_but_the_last_and_for_moe_layers_only(
    name: str, num_moe_layers: int, top_k: int, checkpoints: dict[str, Path]
) -> None:
    for prompt, response in pairs(engine_of(checkpoints[name]).generate(PROMPTS, 3, SAMPLING), PROMPTS):
        num_tokens = len(prompt.token_ids) + len(response.token_ids)
        assert response.routed_experts is not None
        assert response.routed_experts.shape == (num_tokens - 1, num_moe_layers, top_k)
        assert response.routed_experts.dtype == np.uint8
        assert response.routed_experts.base is None, "a response does not hold the memory of its batch"


def test_experts_beyond_the_256th_keep_their_numbers_in_two_bytes(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, Qwen3MoeConfig(**MORE_EXPERTS_THAN_A_BYTE))
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    sampled = pairs(engine_of(checkpoint).generate(PROMPTS, 2, SAMPLING), PROMPTS)
    for prompt, response in sampled:
        assert response.routed_experts.dtype == np.uint16
        np.testing.assert_array_equal(response.routed_experts, expected_routes(reference, prompt, response))
    assert 256 <= max(response.routed_experts.max() for _, response in sampled) < 300


def test_256_experts_fit_a_byte(tmp_path: Path) -> None:
    sizes = MOE | {"num_experts": 256, "num_hidden_layers": 1}
    engine = engine_of(write_checkpoint(tmp_path, Qwen3MoeConfig(**sizes)))
    assert engine.generate(PROMPTS, 1, SAMPLING)[0][0].routed_experts.dtype == np.uint8


def test_a_response_of_one_token_has_the_routes_of_its_prompt(checkpoints: dict[str, Path]) -> None:
    checkpoint = checkpoints["every layer routed"]
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    groups = engine_of(checkpoint).generate(PROMPTS, 2, replace(SAMPLING, max_response_tokens=1))
    for prompt, response in pairs(groups, PROMPTS):
        assert len(response.routed_experts) == len(prompt.token_ids)
        np.testing.assert_array_equal(response.routed_experts, expected_routes(reference, prompt, response))


def test_routes_follow_new_weights(checkpoints: dict[str, Path]) -> None:
    checkpoint = checkpoints["every layer routed"]
    engine = engine_of(checkpoint)
    (before,) = engine.generate(PROMPTS[:1], 1, SAMPLING)[0]
    weights = load_file(checkpoint / "model.safetensors")
    flipped = {name: -tensor if name.endswith("mlp.gate.weight") else tensor for name, tensor in weights.items()}
    engine.update_weights(flipped.items(), version=2)
    (after,) = engine.generate(PROMPTS[:1], 1, SAMPLING)[0]
    assert (before.routed_experts[0, 0] != after.routed_experts[0, 0]).any()


def test_recording_changes_nothing_that_is_sampled_and_off_returns_no_routes(checkpoints: dict[str, Path]) -> None:
    checkpoint = checkpoints["dense layer named"]
    recorded = pairs(engine_of(checkpoint).generate(PROMPTS, 8, SAMPLING), PROMPTS)
    plain = pairs(engine_of(checkpoint, return_routed_experts=False).generate(PROMPTS, 8, SAMPLING), PROMPTS)
    for (_, left), (_, right) in zip(recorded, plain, strict=True):
        assert right.routed_experts is None
        np.testing.assert_array_equal(left.token_ids, right.token_ids)
        np.testing.assert_array_equal(left.log_probs, right.log_probs)


def test_a_batch_leaves_no_hook_behind_even_when_it_fails(checkpoints: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints["every layer routed"], dtype=torch.float32).eval()
    routers = [module for module in model.modules() if isinstance(module, Qwen3MoeTopKRouter)]
    hooks_at_read: list[int] = []
    model.get_input_embeddings().register_forward_hook(
        lambda *_: hooks_at_read.append(sum(len(router._forward_hooks) for router in routers))
    )

    def run(prompt: tuple[int, ...], heard: list[Qwen3MoeTopKRouter]) -> None:
        decode(model, [prompt], [0], replace(SAMPLING, max_response_tokens=2), torch.Generator(), heard)

    run((3, 4), [])
    assert set(hooks_at_read) == {0}, "nothing is hooked when no routes are asked for"
    hooks_at_read.clear()
    run((3, 4), routers)
    assert set(hooks_at_read) == {len(routers)}
    with pytest.raises(IndexError):
        run((3, 99), routers)  # a token beyond the vocabulary
    assert not any(router._forward_hooks for router in routers)


@pytest.mark.parametrize(
    "config",
    [Qwen3Config(**DENSE), Qwen3MoeConfig(**MOE | {"mlp_only_layers": [0, 1, 2, 3]})],
    ids=["dense model", "every layer dense"],
)
def test_routes_of_a_model_without_moe_layers_are_refused(config: Qwen3Config | Qwen3MoeConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    LocalEngine(tmp_path)
    with pytest.raises(UserError, match=r"routing\.replay: r3 .* no MoE layer"):
        LocalEngine(tmp_path, return_routed_experts=True)
