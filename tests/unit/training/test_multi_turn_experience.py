"""From an environment's rewards to what each sampled token of a mini-batch is worth, on the run that a recipe builds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_gspo.data.tokenizer import build_byte_tokenizer
from megatron_gspo.training.assembly import assemble
from megatron_gspo.training.experience import Experience, plan_mini_batches
from tests.unit.rollout.talkative import Talkative
from tests.unit.training.test_step import make_recipe

pytestmark = pytest.mark.usefixtures("_one_rank")

TOKENIZER = build_byte_tokenizer()


class RewardsOddTurns(Talkative):
    """As talkative, and rewards the first, third, … turn alone, so that turns of a response differ in worth."""

    def __init__(self) -> None:
        self._turns = 0

    def step(self, turn_text: str):
        self._turns += 1
        answer = super().step(turn_text)
        return type(answer)(answer.text, reward=0.5 * (self._turns % 2), done=answer.done)


def experience_of(path: Path, objective: str) -> tuple[Experience, torch.Tensor]:
    """One step's experience, and the advantages of its packed tokens or responses."""
    recipe = make_recipe(
        path,
        objective={"name": objective},
        environment={"name": f"{__name__}:{RewardsOddTurns.__name__}", "max_observation_tokens": 8},
        reward={"name": "last_digit"},
        routing={"measure": False},
    )
    run = assemble(recipe)
    try:
        experience = run.collector.collect(1, run.policy.version)
        planned = plan_mini_batches(experience, recipe, pad_token_id=256)
        return experience, torch.cat([packed.advantages for batch in planned for packed in batch.micro_batches])
    finally:
        run.close()


def test_each_turn_of_gspo_token_is_worth_the_rewards_from_its_own_on(tmp_path: Path):
    experience, packed = experience_of(tmp_path, "gspo_token")
    samples = {sample.index: sample for samples in experience.samples for sample in samples}
    index, several_levels, expected_of_all = 0, 0, []
    for group in experience.groups:
        # The answer is a digit, which random weights hardly ever say last: all rewards are the environment's.
        totals = np.array([response.token_rewards.sum() for response in group.responses], dtype=np.float64)
        assert (group.rewards >= totals).all()
        assert ((group.rewards - totals) % 1 == 0).all(), "the response's own reward is 0 or 1"
        mean, deviation = group.rewards.astype(float).mean(), group.rewards.astype(float).std()
        for response, total in zip(group.responses, group.rewards, strict=True):
            sample = samples[index]
            index += 1
            np.testing.assert_array_equal(sample.is_sampled, response.is_sampled)
            to_go = total - np.cumsum(response.token_rewards) + response.token_rewards
            expected = (to_go - mean) / deviation if deviation > 0 else np.zeros(len(to_go))
            found = (
                np.full(len(to_go), sample.advantage) if sample.token_advantages is None else sample.token_advantages
            )
            np.testing.assert_allclose(found, expected, atol=1e-6)
            several_levels += len(set(expected[response.is_sampled].tolist())) > 1
            expected_of_all += expected[response.is_sampled].tolist()
    assert several_levels > 0
    np.testing.assert_allclose(sorted(packed.tolist()), sorted(expected_of_all), atol=1e-6)


def test_gspo_takes_the_sum_of_a_responses_rewards(tmp_path: Path):
    experience, packed = experience_of(tmp_path, "gspo")
    assert all(sample.token_advantages is None for samples in experience.samples for sample in samples)
    assert sorted(packed.tolist()) == sorted(float(a) for group in experience.groups for a in group.advantages)
    assert packed.any()
