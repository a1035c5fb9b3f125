"""Responses of several turns from the real local engine, held against one pass of the plain model over all of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_gspo.data.tokenizer import build_byte_tokenizer
from megatron_gspo.rollout.calculator import Calculator
from megatron_gspo.rollout.environments import Observation, find_environment
from megatron_gspo.rollout.local import LocalEngine
from megatron_gspo.rollout.multi_turn import MultiTurn
from megatron_gspo.types import Prompt, Response, SamplingSettings, UserError
from tests.tiny_model import write_tiny_model
from tests.unit.rollout.talkative import ENDS_A_TURN, Talkative

TOKENIZER = build_byte_tokenizer()
EOS = TOKENIZER.eos_token_id
PROMPTS = [
    Prompt(f"test:{text}", tuple(TOKENIZER.encode(text)), text, answer="") for text in ("3+2=", "a longer prompt: ")
]
STOP_TOKENS = (EOS, *(TOKENIZER.encode(text)[0] for text in ENDS_A_TURN))
SETTINGS = SamplingSettings(max_response_tokens=10, temperature=0.9, stop_token_ids=(EOS,), seed=3)
G = 6


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LocalEngine:
    path = write_tiny_model(tmp_path_factory.mktemp("model"))
    engine = LocalEngine(path, return_routed_experts=True)
    torch.manual_seed(0)
    weights = {name: torch.randn(tensor.shape) * 0.1 for name, tensor in engine._destinations.items()}
    engine.update_weights(weights.items(), version=4)
    return engine


def multi_turn(engine: LocalEngine, environment: object = Talkative, **limits: int) -> MultiTurn:
    return MultiTurn(engine, environment, TOKENIZER, **{"max_turns": 4, "max_observation_tokens": 20} | limits)


@torch.no_grad()
def in_one_pass(engine: LocalEngine, prompt: Prompt, response: Response) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs [tokens] and sorted routes [prompt + tokens - 1, L, K] from one pass over the whole sequence."""
    chosen: list[torch.Tensor] = []
    hooks = [router.register_forward_hook(lambda _, __, out: chosen.append(out[2])) for router in engine._routers]
    token_ids = torch.tensor([[*prompt.token_ids, *response.token_ids.tolist()]])
    log_probs = (engine._model(token_ids).logits[0].float() / SETTINGS.temperature).log_softmax(-1)
    for hook in hooks:
        hook.remove()
    start = len(prompt.token_ids) - 1
    of_tokens = log_probs[start:-1].gather(1, torch.from_numpy(response.token_ids)[:, None])[:, 0]
    return of_tokens.numpy(), np.sort(torch.stack(chosen, dim=1)[:-1].numpy())


def stretches(response: Response) -> list[tuple[bool, str]]:
    """Whether the policy wrote it, and what: stretch by stretch."""
    assert response.is_sampled is not None
    bounds = [0, *(np.flatnonzero(np.diff(response.is_sampled)) + 1).tolist(), len(response.token_ids)]
    return [
        (bool(response.is_sampled[start]), TOKENIZER.decode(response.token_ids[start:end], skip_special_tokens=True))
        for start, end in pairwise(bounds)
    ]


def test_log_probs_and_routes_of_all_turns_are_those_of_one_pass_over_the_sequence(engine: LocalEngine):
    groups = multi_turn(engine).generate(PROMPTS, G, SETTINGS)
    num_turns = set()
    for prompt, group in zip(PROMPTS, groups, strict=True):
        assert len(group) == G
        for response in group:
            log_probs, routes = in_one_pass(engine, prompt, response)
            assert response.is_sampled is not None
            np.testing.assert_allclose(
                response.log_probs[response.is_sampled], log_probs[response.is_sampled], atol=1e-4
            )
            assert (response.log_probs[~response.is_sampled] == 0).all()
            np.testing.assert_array_equal(np.sort(response.routed_experts), routes)
            assert (response.prompt_id, response.weight_version) == (prompt.id, 4)
            num_turns.add(response.num_turns)
    assert num_turns >= {2, 3, 4}
    assert len({tuple(response.token_ids) for group in groups for response in group}) == 2 * G


def test_only_the_environments_tokens_are_masked_and_each_turn_has_its_reward(engine: LocalEngine):
    for response in (response for group in multi_turn(engine).generate(PROMPTS, G, SETTINGS) for response in group):
        parts = stretches(response)
        assert parts[0] == (False, "[go]"), "what `reset` said comes first"
        written = [text for sampled, text in parts if sampled]
        heard = [text for sampled, text in parts if not sampled][1:]
        assert heard == [f"[{len(text)}]" for text in written[:-1]]
        assert response.num_turns == len(written)
        assert response.num_sampled_tokens == response.is_sampled.sum() < len(response.token_ids)
        assert TOKENIZER.decode(response.last_turn_token_ids, skip_special_tokens=True) == written[-1]
        ends = np.flatnonzero(response.is_sampled & ~np.append(response.is_sampled[1:], False))
        answered = [end for end in ends if response.token_ids[end] in STOP_TOKENS]  # the others ran into the limit
        expected = np.zeros(len(response.token_ids), dtype=np.float32)
        expected[answered] = 0.25
        np.testing.assert_array_equal(response.token_rewards, expected)


def test_turns_draw_anew_and_a_call_repeats(engine: LocalEngine):
    episodes = multi_turn(engine)
    first, again = episodes.generate(PROMPTS, G, SETTINGS), episodes.generate(PROMPTS, G, SETTINGS)
    other = episodes.generate(PROMPTS, G, replace(SETTINGS, seed=4))
    assert [[r.token_ids.tolist() for r in group] for group in first] == [
        [r.token_ids.tolist() for r in group] for group in again
    ]
    assert [[r.token_ids.tolist() for r in group] for group in first] != [
        [r.token_ids.tolist() for r in group] for group in other
    ]


class Silent(Talkative):
    """Never asked anything: a response is its first turn."""

    def reset(self, prompt: Prompt) -> None:
        return None

    def step(self, turn_text: str) -> Observation:
        return Observation(done=True)


def test_an_environment_that_says_nothing_gives_the_engines_own_responses(engine: LocalEngine):
    settings = replace(SETTINGS, stop_token_ids=STOP_TOKENS)
    alone = engine.generate(PROMPTS, G, settings)
    for group, expected in zip(multi_turn(engine, Silent).generate(PROMPTS, G, SETTINGS), alone, strict=True):
        for response, one_turn in zip(group, expected, strict=True):
            assert response.token_ids.tolist() == one_turn.token_ids.tolist()
            assert response.finish_reason == one_turn.finish_reason
            assert response.num_turns == 1
            np.testing.assert_array_equal(response.routed_experts, one_turn.routed_experts)


def test_limits_end_a_response_unfinished_and_cut_an_observation(engine: LocalEngine):
    responses = [
        r for g in multi_turn(engine, max_turns=2, max_observation_tokens=2).generate(PROMPTS, G, SETTINGS) for r in g
    ]
    asked_again = [r for r in responses if r.num_turns == 2 and stretches(r)[-1][1][-1:] in ENDS_A_TURN]
    assert asked_again
    assert all(response.finish_reason == "length" for response in asked_again)
    assert all(
        text in ("[g", "[" + text[1:]) and len(text) == 2 for r in responses for own, text in stretches(r) if not own
    )


class Failing(Talkative):
    def step(self, turn_text: str) -> Observation:
        raise OSError("the tool is gone")


def test_an_environment_that_fails_ends_its_response_and_is_counted(
    engine: LocalEngine, caplog: pytest.LogCaptureFixture
):
    episodes = multi_turn(engine, Failing)
    responses = [response for group in episodes.generate(PROMPTS, G, SETTINGS) for response in group]
    failed = [response for response in responses if response.finish_reason == "abort"]
    assert failed
    assert all(response.num_turns == 1 for response in responses)
    assert episodes.take_counts() == {"rollout/num_environment_failures": len(failed)}
    assert episodes.take_counts() == {"rollout/num_environment_failures": 0}
    assert "the tool is gone" in caplog.text


def test_a_stop_text_of_several_tokens_is_refused(engine: LocalEngine):
    class Wordy(Talkative):
        stop_texts = ("</tool>",)

    with pytest.raises(UserError, match=r"environment\.name: a turn is to end at '</tool>', which is 7 tokens"):
        multi_turn(engine, Wordy)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("calculater", "environment.name is 'calculater' (did you mean 'calculator'?)"),
        ("megatron_gspo.types:Prompt", "makes no environment: TypeError"),
        ("megatron_gspo.rollout.calculator:NO_OPERATION", "cannot be called"),
        ("builtins:dict", "makes a dict, which is no environment: it has no stop_texts, reset, step"),
    ],
)
def test_what_is_no_environment_is_refused(name: str, told: str):
    with pytest.raises(UserError) as refused:
        find_environment(name)
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("turns", "answers"),
    [
        (["3+2?", "-7?", "*9?", "=2"], ["5", "8", "2", None]),
        (["3+2-7?"], ["5"]),  # the operation right before the mark, not the chain
        (["3+2", "anything"], [None, None]),
        (["?", "+?", "4*4?"], ["!", "!", "6"]),
    ],
)
def test_the_calculator_works_out_what_stands_before_its_mark(turns: list[str], answers: list[str | None]):
    calculator = Calculator()
    for turn, expected in zip(turns, answers, strict=True):
        answer = calculator.step(turn)
        assert (None if answer.done else answer.text) == expected
        assert answer.reward == (-0.1 if expected == "!" else 0.0)


def test_calculator_demonstrations_are_what_it_answers(tmp_path: Path):
    from megatron_gspo.data.tasks import ArithmeticChain

    task, rng = ArithmeticChain(4, 4, 3, calculator=True), np.random.default_rng(1)
    for _ in range(50):
        problem = task.draw(rng)
        demonstrated = task.demonstration(problem.prompt, rng, wrong_step_fraction=0.0)
        *asked, answer = demonstrated.split("?")
        calculator, heard = Calculator(), ""
        for turn in asked:
            assert turn.startswith(heard)
            heard = calculator.step(turn.removeprefix(heard) + "?").text
        assert answer == f"{heard}={problem.answer}"
