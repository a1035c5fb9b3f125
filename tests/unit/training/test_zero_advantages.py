"""Responses of advantage 0 teach nothing: they are not passed through the model, and what is learned is the same."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_gspo.training.experience import Experience, plan_mini_batches
from megatron_gspo.types import Sample
from tests.one_update import (
    gradients,
    make_policy,
    make_recipe,
    make_samples,
    old_log_probs_nearby,
    update,
)

pytestmark = pytest.mark.usefixtures("_one_rank")


def with_advantages_of_zero(samples: list[Sample], every: int) -> list[Sample]:
    return [replace(sample, advantage=0.0) if sample.index % every == 0 else sample for sample in samples]


@pytest.mark.parametrize("objective", ["gspo", "gspo_token", "grpo"])
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_responses_of_advantage_zero_are_not_passed_and_the_gradient_is_the_same(
    objective: str, aggregation: str, tmp_path: Path
):
    samples = tuple(with_advantages_of_zero(make_samples(), every=2))
    found = {}
    for skip in (True, False):
        recipe = make_recipe(
            tmp_path,
            objective={"name": objective, "aggregation": aggregation},
            training={"learning_rate": 1e-12, "gradient_clip": 1e9, "skip_zero_advantages": skip},
        )
        policy = make_policy(recipe)
        experience = Experience(groups=(), samples=(samples,), num_failed_rewards=0, rollout_s=0.0, reward_s=0.0)
        (mini_batch,) = plan_mini_batches(experience, recipe, pad_token_id=256)
        passed = [index for micro_batch in mini_batch.micro_batches for index in micro_batch.sample_indices]
        assert len(passed) == (len(samples) // 2 if skip else len(samples))
        old = old_log_probs_nearby(policy, mini_batch, samples)
        totals = update(policy, recipe, mini_batch, old)
        assert totals.sums["clip/token_fraction"][0] > 0
        found[skip] = gradients(policy), totals.sums
    for name, gradient in found[False][0].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[True][0][name], gradient, rtol=1e-4, atol=1e-6 * scale + 1e-9)
    for name in ("loss/policy", "clip/token_fraction", "clip/low_fraction", "clip/sequence_fraction"):
        assert found[True][1][name] == pytest.approx(found[False][1][name], rel=1e-5), name


@pytest.mark.parametrize(
    "sections",
    [
        {"objective": {"kl_coefficient": 0.1}},
        {"objective": {"name": "megatron_gspo.policy_loss.gspo:GSPO"}},
        {"training": {"skip_zero_advantages": False}},
    ],
)
def test_responses_of_advantage_zero_are_passed_where_they_may_have_a_gradient(sections: dict, tmp_path: Path):
    recipe = make_recipe(tmp_path, **sections)
    samples = tuple(with_advantages_of_zero(make_samples(), every=2))
    experience = Experience(groups=(), samples=(samples,), num_failed_rewards=0, rollout_s=0.0, reward_s=0.0)
    (mini_batch,) = plan_mini_batches(experience, recipe, pad_token_id=256)
    assert mini_batch.skipped == ()


def test_a_mini_batch_of_nothing_but_advantages_of_zero_is_passed_so_that_it_is_measured(tmp_path: Path):
    recipe = make_recipe(tmp_path)
    samples = tuple(with_advantages_of_zero(make_samples(), every=1))
    experience = Experience(groups=(), samples=(samples,), num_failed_rewards=0, rollout_s=0.0, reward_s=0.0)
    (mini_batch,) = plan_mini_batches(experience, recipe, pad_token_id=256)
    assert mini_batch.skipped == ()
    assert sum(micro_batch.num_responses for micro_batch in mini_batch.micro_batches) == len(samples)
