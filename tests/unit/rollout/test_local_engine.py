"""The local engine, held against the plain Transformers model whose checkpoint it was given."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3MoeConfig

from megatron_gspo.rollout.engine import RolloutEngine
from megatron_gspo.rollout.local import LocalEngine
from megatron_gspo.types import OpenGroup, Prompt, Response, SamplingSettings, UserError

VOCABULARY_SIZE = 24
SIZES = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.15,  # logits that differ enough for sampling and greedy choices to mean something
}
CONFIGS = {
    "mixture of experts": Qwen3MoeConfig(
        **SIZES,
        moe_intermediate_size=16,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
    "dense, tied embeddings": Qwen3Config(**SIZES, tie_word_embeddings=True),
}
PROMPTS = [
    Prompt(id=f"test:{index}", token_ids=token_ids, text="", answer="")
    for index, token_ids in enumerate([(3, 4, 5, 6, 7, 8, 9), (10,), (11, 12, 3), (4, 4, 17, 20)])
]
SAMPLING = SamplingSettings(max_response_tokens=12, temperature=0.7, stop_token_ids=(1, 2), seed=5)


@pytest.fixture(scope="module", params=list(CONFIGS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory as Transformers writes it: the names and shapes on disk are upstream's, not ours."""
    directory = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[request.param], dtype=torch.float32).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def weights(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / "model.safetensors")


@pytest.fixture
def engine(checkpoint: Path, weights: dict[str, Tensor]) -> Iterator[RolloutEngine]:
    engine = LocalEngine(checkpoint)
    engine.update_weights(weights.items(), version=7)
    yield engine
    engine.close()


@torch.no_grad()
def expected_log_probs(model: PreTrainedModel, prompt: Prompt, response: Response, temperature: float) -> np.ndarray:
    """[tokens] from one forward pass over prompt and response, without cache, padding or batch."""
    tokens = torch.tensor([[*prompt.token_ids, *response.token_ids.tolist()]])
    log_p = (model(tokens).logits[0].double() / temperature).log_softmax(dim=-1)
    start = len(prompt.token_ids)
    return log_p[start - 1 : -1].gather(1, tokens[0, start:, None]).squeeze(1).numpy()


def assert_same(left: list[tuple[Response, ...]], right: list[tuple[Response, ...]]) -> None:
    for first, second in zip(sum(left, ()), sum(right, ()), strict=True):
        np.testing.assert_array_equal(first.token_ids, second.token_ids)
        np.testing.assert_allclose(first.log_probs, second.log_probs, atol=1e-4)


def test_log_probs_equal_a_full_forward_pass_whatever_prompts_share_the_batch(
    engine: RolloutEngine, reference: PreTrainedModel
) -> None:
    groups = engine.generate(PROMPTS, 8, SAMPLING)
    lengths = {len(response.token_ids) for group in groups for response in group}
    assert len(lengths) > 4, "responses end at different steps, so rows left the batch in between"
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for response in group:
            expected = expected_log_probs(reference, prompt, response, SAMPLING.temperature)
            np.testing.assert_allclose(response.log_probs, expected, atol=1e-4)


def test_responses_come_in_the_order_of_prompts_with_what_they_promise(engine: RolloutEngine) -> None:
    groups = engine.generate(PROMPTS, 5, SAMPLING)
    assert [[response.prompt_id for response in group] for group in groups] == [[p.id] * 5 for p in PROMPTS]
    reasons = set()
    for response in sum(groups, ()):
        assert response.weight_version == 7
        assert response.token_ids.dtype == np.int64
        assert response.log_probs.dtype == np.float32
        stops = np.isin(response.token_ids, SAMPLING.stop_token_ids)
        assert not stops[:-1].any(), "nothing follows a stop token"
        assert stops[-1] == (response.finish_reason == "stop")
        if response.finish_reason == "length":
            assert len(response.token_ids) == SAMPLING.max_response_tokens
        reasons.add(response.finish_reason)
    assert reasons == {"stop", "length"}


def test_temperature_zero_chooses_what_transformers_chooses_greedily(
    engine: RolloutEngine, reference: PreTrainedModel
) -> None:
    settings = replace(SAMPLING, temperature=0.0)
    for prompt, (response,) in zip(PROMPTS, engine.generate(PROMPTS, 1, settings), strict=True):
        generated = reference.generate(
            torch.tensor([prompt.token_ids]),
            do_sample=False,
            max_new_tokens=settings.max_response_tokens,
            eos_token_id=list(settings.stop_token_ids),
            pad_token_id=0,
        )
        assert response.token_ids.tolist() == generated[0, len(prompt.token_ids) :].tolist()
        expected = expected_log_probs(reference, prompt, response, temperature=1.0)
        np.testing.assert_allclose(response.log_probs, expected, atol=1e-4)


def test_the_seed_alone_decides_what_is_sampled(engine: RolloutEngine) -> None:
    torch.manual_seed(1)
    first = engine.generate(PROMPTS, 4, SAMPLING)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert_same(engine.generate(PROMPTS, 4, SAMPLING), first)
    assert torch.equal(torch.get_rng_state(), state), "the global random state is left alone"
    other = engine.generate(PROMPTS, 4, replace(SAMPLING, seed=6))
    assert [r.token_ids.tolist() for r in sum(other, ())] != [r.token_ids.tolist() for r in sum(first, ())]
    assert len({tuple(response.token_ids) for response in first[0]}) > 1, "a group's responses differ"


@pytest.mark.parametrize("max_concurrent_responses", [1, 5, 8])
def test_the_size_of_a_batch_does_not_change_what_is_sampled(
    max_concurrent_responses: int, checkpoint: Path, weights: dict[str, Tensor], engine: RolloutEngine
) -> None:
    small = LocalEngine(checkpoint, max_concurrent_responses=max_concurrent_responses)
    small.update_weights(weights.items(), version=0)
    assert_same(small.generate(PROMPTS, 3, SAMPLING), engine.generate(PROMPTS, 3, SAMPLING))


def test_responses_that_leave_the_batch_do_not_change_the_others(engine: RolloutEngine) -> None:
    everyone_stays = engine.generate(PROMPTS, 8, replace(SAMPLING, stop_token_ids=()))
    some_leave = engine.generate(PROMPTS, 8, SAMPLING)
    num_stopped = 0
    for long, short in zip(sum(everyone_stays, ()), sum(some_leave, ()), strict=True):
        np.testing.assert_array_equal(short.token_ids, long.token_ids[: len(short.token_ids)])
        np.testing.assert_allclose(short.log_probs, long.log_probs[: len(short.token_ids)], atol=1e-4)
        num_stopped += short.finish_reason == "stop"
    assert 8 < num_stopped < 32


@pytest.mark.parametrize("restriction", [{"top_k": 2}, {"top_p": 0.4}, {"top_k": 3, "top_p": 0.6}])
def test_top_k_and_top_p_restrict_the_choice_but_log_probs_stay_unrenormalised(
    restriction: dict[str, float], engine: RolloutEngine, reference: PreTrainedModel
) -> None:
    settings = replace(SAMPLING, **restriction)
    for prompt, group in zip(PROMPTS, engine.generate(PROMPTS, 6, settings), strict=True):
        for response in group:
            tokens = torch.tensor([[*prompt.token_ids, *response.token_ids.tolist()]])
            with torch.no_grad():
                p = (reference(tokens).logits[0, len(prompt.token_ids) - 1 : -1] / settings.temperature).softmax(dim=-1)
            chosen = p.gather(1, torch.from_numpy(response.token_ids)[:, None])
            likelier = p > chosen
            assert (likelier.sum(dim=1) < (settings.top_k or VOCABULARY_SIZE)).all()
            assert ((p * likelier).sum(dim=1) < settings.top_p + 1e-5).all()
            np.testing.assert_allclose(response.log_probs, chosen.log().squeeze(1).numpy(), atol=1e-4)


def test_new_weights_replace_the_old_ones_in_the_next_responses(
    engine: RolloutEngine, reference: PreTrainedModel, weights: dict[str, Tensor]
) -> None:
    before = engine.generate(PROMPTS[:1], 1, SAMPLING)[0][0]
    engine.update_weights(((name, -tensor) for name, tensor in weights.items()), version=8)
    after = engine.generate(PROMPTS[:1], 1, SAMPLING)[0][0]
    assert (before.weight_version, after.weight_version, engine.weight_version) == (7, 8, 8)
    assert before.token_ids.tolist() != after.token_ids.tolist()
    engine.update_weights(weights.items(), version=9)
    assert_same([(engine.generate(PROMPTS[:1], 1, SAMPLING)[0][0],)], [(before,)])


def test_an_update_that_is_not_the_whole_policy_is_refused_and_stops_generation(
    engine: RolloutEngine, weights: dict[str, Tensor]
) -> None:
    name, tensor = next(iter(weights.items()))
    rest = {other: weights[other] for other in weights if other != name}
    refusals = {
        rf"1 of {len(weights)} parameters are missing, the first is {name}": rest,
        "model.layers.9.extra is not a parameter": weights | {"model.layers.9.extra": tensor},
        rf"{name} has shape .* config makes it": rest | {name: tensor[:-1]},
    }
    for message, incomplete in refusals.items():
        with pytest.raises(UserError, match=message):
            engine.update_weights(incomplete.items(), version=8)
        with pytest.raises(RuntimeError, match="no weights"):
            engine.generate(PROMPTS, 2, SAMPLING)
    with pytest.raises(UserError, match=f"{name} was given twice"):
        engine.update_weights([*weights.items(), (name, tensor)], version=8)
    engine.update_weights(weights.items(), version=9)
    assert engine.generate(PROMPTS, 2, SAMPLING)[0][0].weight_version == 9


def test_one_missing_projection_of_one_expert_is_named(engine: RolloutEngine, weights: dict[str, Tensor]) -> None:
    name = max(name for name in weights if name.endswith("up_proj.weight"))
    with pytest.raises(UserError, match=name):
        engine.update_weights(((other, weights[other]) for other in weights if other != name), version=8)


def test_generating_before_the_first_update_or_after_closing_is_an_error(
    checkpoint: Path, engine: RolloutEngine
) -> None:
    with pytest.raises(RuntimeError, match="no weights"):
        LocalEngine(checkpoint).generate(PROMPTS, 2, SAMPLING)
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="no weights"):
        engine.generate(PROMPTS, 2, SAMPLING)


def test_bfloat16_model_takes_float32_weights_and_returns_float32_log_probs(
    checkpoint: Path, weights: dict[str, Tensor], reference: PreTrainedModel
) -> None:
    engine = LocalEngine(checkpoint, dtype=torch.bfloat16)
    engine.update_weights(weights.items(), version=1)
    for prompt, group in zip(PROMPTS, engine.generate(PROMPTS, 4, SAMPLING), strict=True):
        for response in group:
            assert response.log_probs.dtype == np.float32
            expected = expected_log_probs(reference, prompt, response, SAMPLING.temperature)
            assert np.median(np.abs(response.log_probs - expected)) < 0.3


def test_no_prompts_give_no_responses(engine: RolloutEngine) -> None:
    assert engine.generate([], 4, SAMPLING) == []


def test_a_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no config"):
        LocalEngine(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "llama"}', "accepts qwen3 and qwen3_moe"),
        ('{"model_type": "qwen3", "use_sliding_window": true}', "sliding"),
    ],
)
def test_a_model_this_engine_cannot_run_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        LocalEngine(tmp_path)


def test_a_closed_batch_goes_on_later_and_each_token_stays_as_it_was_sampled(
    checkpoint: Path, weights: dict[str, Tensor], reference: PreTrainedModel
) -> None:
    routed = hasattr(reference.config, "num_experts")
    engine = LocalEngine(checkpoint, return_routed_experts=routed, max_concurrent_responses=7)
    engine.update_weights(weights.items(), version=7)
    groups = [OpenGroup.of(prompt, 2) for prompt in PROMPTS]
    closed = engine.generate_until(groups, 1, SAMPLING)
    assert any(group.is_complete for group in closed)
    begun = [response for group in closed for response in group.responses if response is not None]
    assert {"abort", "stop"} <= {response.finish_reason for response in begun}
    assert len(begun) == 7, "the second batch was not begun"

    other = AutoModelForCausalLM.from_config(reference.config, dtype=torch.float32).eval()
    other.load_state_dict({name: tensor * 0.9 for name, tensor in reference.state_dict().items()})
    engine.update_weights(((name, tensor * 0.9) for name, tensor in weights.items()), version=8)
    finished = engine.generate_until(closed, 4, SAMPLING)
    engine.close()
    assert all(group.is_complete for group in finished)
    for before, after in zip(closed, finished, strict=True):
        for old, new in zip(before.responses, after.responses, strict=True):
            num_old = 0 if old is None else len(old.token_ids)
            assert new.token_ids[:num_old].tolist() == ([] if old is None else old.token_ids.tolist())
            by_old = expected_log_probs(reference, after.prompt, new, SAMPLING.temperature)
            by_new = expected_log_probs(other, after.prompt, new, SAMPLING.temperature)
            expected = np.where(new.token_versions == 7, by_old, by_new)
            np.testing.assert_allclose(new.log_probs, expected, atol=1e-4)
            assert (new.token_versions == 7).sum() == num_old
            assert not np.isin(new.token_ids[:-1], SAMPLING.stop_token_ids).any()
            assert len(new.token_ids) <= SAMPLING.max_response_tokens
            if routed:
                assert len(new.routed_experts) == len(after.prompt.token_ids) + len(new.token_ids) - 1
                num_routes = 0 if old is None else len(old.routed_experts)
                assert new.routed_experts[:num_routes].tolist() == ([] if old is None else old.routed_experts.tolist())


def test_an_interrupted_call_has_lost_nothing(engine: RolloutEngine) -> None:
    interrupt = threading.Event()
    interrupt.set()
    groups = [OpenGroup.of(prompt, 2) for prompt in PROMPTS]
    assert engine.generate_until(groups, 4, SAMPLING, interrupt) == groups
    interrupt.clear()
    assert all(group.is_complete for group in engine.generate_until(groups, 4, SAMPLING, interrupt))
