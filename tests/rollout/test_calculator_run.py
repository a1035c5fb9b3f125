"""A run whose policy asks a calculator, with turns from a real SGLang server: what was sampled is learned from, turn by turn."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_gspo import parallel
from megatron_gspo.config import ParallelSection, Recipe
from megatron_gspo.data.tokenizer import build_byte_tokenizer
from megatron_gspo.policy_loss import policy_loss
from megatron_gspo.rollout.calculator import NO_OPERATION, Calculator
from megatron_gspo.rollout.sglang import ServerHost
from megatron_gspo.training import step
from megatron_gspo.training.collector import ExperienceCollector
from megatron_gspo.training.experience import Experience
from megatron_gspo.training.loop import train
from megatron_gspo.types import Group, Response, Sample
from tests.rollout.real_server import load, policy, servers_of

RECIPE = Path(__file__).parents[2] / "recipes" / "tiny_gspo_token_calculator.yaml"
TOKENIZER = build_byte_tokenizer()
STEPS = 2

#: What may be written behind what: `3+3?`, too early a `?`, or the end.
FOLLOWS = {"=": "3", "0123456789": "+?\0", "+-*": "3", "!": "3+"}


@torch.no_grad()
def write_policy_that_asks(recipe: Recipe, path: Path) -> Path:
    """The served model with weights that write by `FOLLOWS`: a direction of the residual stream for what was read last."""
    model = policy(recipe, seed=1)
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    for direction, (read, written) in enumerate(FOLLOWS.items()):
        embedding[TOKENIZER.encode(read), direction] += 4.0
        head[TOKENIZER.encode(written.strip("\0")), direction] += 4.0
        head[TOKENIZER.eos_token_id, direction] += 3.8 * ("\0" in written)  # less often, so that there are more turns
    model.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


def answers_of(calculator: Calculator, response: Response) -> list[int]:
    """The tokens of a response, with the calculator's own where it says it was answered."""
    tokens: list[int] = []
    turn: list[int] = []
    for token, sampled in zip(response.token_ids.tolist(), response.is_sampled, strict=True):
        if sampled:
            turn.append(token)
            tokens.append(token)
        elif turn:
            tokens += TOKENIZER.encode(calculator.step(TOKENIZER.decode(turn, skip_special_tokens=True)).text)
            turn = []
    return tokens


def returns_to_go(response: Response, reward: float) -> np.ndarray:
    """[tokens]: the response's rewards from each token on. A turn that asked in vain cost it something, at its end."""
    before = np.cumsum(response.token_rewards) - response.token_rewards
    return reward - before.astype(np.float64)


def advantages_of(group: Group) -> list[np.ndarray]:
    """Of each response [sampled tokens], by docs/multi_turn.md."""
    mean, deviation = group.rewards.astype(float).mean(), group.rewards.astype(float).std()
    return [
        (returns_to_go(response, float(reward)) - mean)[response.is_sampled] / deviation
        if deviation > 0
        else np.zeros(response.num_sampled_tokens)
        for response, reward in zip(group.responses, group.rewards, strict=True)
    ]


@pytest.mark.usefixtures("_signals_as_they_were")
def test_a_run_learns_from_what_its_turns_sampled_each_by_the_rewards_that_followed_it(
    recipe: Recipe, host: ServerHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    experiences: list[Experience] = []
    learned: list[list[float]] = []  # by mini-batch and micro-batch: the advantage of each token in a policy loss
    collect = ExperienceCollector.collect

    def noted_collect(self: ExperienceCollector, *arguments: Any) -> Experience:
        experiences.append(collect(self, *arguments))
        return experiences[-1]

    def noted_loss(*arguments: Any, **named: Any) -> Any:
        given = inspect.signature(policy_loss).bind(*arguments, **named).arguments
        advantages, lengths = given["advantages"], given["cu_seqlens"].diff()
        per_token = advantages.ndim == 1 and len(advantages) == len(given["log_probs"])
        learned.append((advantages if per_token else advantages.repeat_interleave(lengths)).tolist())
        return policy_loss(*arguments, **named)

    monkeypatch.setattr(ExperienceCollector, "collect", noted_collect)
    monkeypatch.setattr(step, "policy_loss", noted_loss)
    model = write_policy_that_asks(recipe, tmp_path / "model")
    options = ["rollout.engine=sglang", *servers_of(host), f"model.path={model}", "routing.replay=r3"]
    options += [f"training.steps={STEPS}", "training.prompts_per_step=8", "training.mini_batches=2", "data.eval=null"]
    options += ["training.learning_rate=0.001", "training.warmup_updates=0", "logging.tensorboard=false"]
    calculator_recipe = load(RECIPE, *options)
    parallel.initialize_distributed()
    parallel.initialize_model_parallel(ParallelSection(), seed=1)
    assert train(calculator_recipe, tmp_path / "run")

    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["policy_version"] for line in lines] == list(range(1, STEPS + 1))
    num_levels, answered = [], []
    for version, (experience, line) in enumerate(zip(experiences, lines, strict=True)):
        samples = {sample.index: sample for batch in experience.samples for sample in batch}
        responses = [response for group in experience.groups for response in group.responses]
        for index, response in enumerate(responses):
            assert_is_the_responses(samples[index], response, version)
            assert answers_of(Calculator(), response) == response.token_ids.tolist()
            answered += response.token_ids[~response.is_sampled].tolist()
        expected = [of_tokens for group in experience.groups for of_tokens in advantages_of(group)]
        num_levels += [len(set(of_tokens.round(4).tolist())) for of_tokens in expected]
        taught = sorted(float(value) for of_tokens in expected if of_tokens.any() for value in of_tokens)
        np.testing.assert_allclose(taught, sorted(learned_in(learned, len(taught))), atol=1e-5)
        # The trainer's own likelihoods and routes of all that was sampled and read, at the version said to have done so.
        assert line["mismatch/log_prob_abs_mean"] < 1e-4
        assert line["routing/engine_disagreement"] == 0.0
        assert line["routing/replayed_token_fraction"] == 1.0
        assert line["rollout/num_stale_responses"] == line["rollout/num_environment_failures"] == 0
        assert line["response/length_mean"] == np.mean([response.num_sampled_tokens for response in responses])
        assert line["response/turns_mean"] == np.mean([response.num_turns for response in responses])
        assert line["grad_norm"] > 0
    assert not learned, "no loss had other tokens"
    assert max(num_levels) > 1, "turns of one response are worth different things"
    texts = set(TOKENIZER.decode(answered))
    assert NO_OPERATION.text in texts
    assert texts & set("0123456789")


def learned_in(learned: list[list[float]], num_tokens: int) -> list[float]:
    """Take the losses of the next `num_tokens` tokens."""
    taken: list[float] = []
    while len(taken) < num_tokens:
        taken += learned.pop(0)
    return taken


def assert_is_the_responses(sample: Sample, response: Response, version: int) -> None:
    """A sample is its response, sampled by one version of the weights, the one that learns from it."""
    np.testing.assert_array_equal(sample.response_token_ids, response.token_ids)
    np.testing.assert_array_equal(sample.is_sampled, response.is_sampled)
    assert [span.version for span in response.version_spans] == [version]
    assert not sample.staleness.any()
    assert (response.log_probs[~response.is_sampled] == 0).all()
    assert response.log_probs[response.is_sampled].min() < 0 >= response.log_probs.max()
