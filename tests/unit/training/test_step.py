"""One policy update on the real model: what the gradient depends on, and what stops it."""

import dataclasses
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_gspo.training.assembly import build_models, frozen_copy, reinforcement_learning_rate
from megatron_gspo.training.experience import Experience, MiniBatch, pack_samples, plan_mini_batches
from megatron_gspo.training.forward import token_log_probs
from megatron_gspo.training.guards import SkippedUpdates, TrainingDivergedError
from megatron_gspo.training.old_policy import baseline_log_probs
from megatron_gspo.training.optimizer import build_trainable_policy
from megatron_gspo.training.step import MiniBatchLoss, update_policy
from megatron_gspo.training.totals import Totals
from megatron_gspo.types import Sample
from tests.one_update import (
    gradients,
    make_policy,
    make_recipe,
    make_samples,
    mini_batch_of,
    old_log_probs_nearby,
    update,
    with_budget,
)

pytestmark = pytest.mark.usefixtures("_one_rank")


@pytest.mark.parametrize("objective", ["gspo", "gspo_token", "grpo"])
def test_the_gradient_does_not_depend_on_the_micro_batch_size(objective: str, tmp_path: Path):
    recipe = make_recipe(
        tmp_path, objective={"name": objective}, training={"learning_rate": 1e-12, "gradient_clip": 1e9}
    )
    samples = make_samples()
    found = {}
    for tokens in (64, 160, 10_000):
        cut = with_budget(recipe, tokens)
        policy = make_policy(cut)
        mini_batch = mini_batch_of(samples, cut)
        old = old_log_probs_nearby(policy, mini_batch, samples)
        totals = update(policy, cut, mini_batch, old)
        assert 0 < totals.sums["clip/token_fraction"][0] < totals.sums["clip/token_fraction"][1]
        found[tokens] = (len(mini_batch.micro_batches), gradients(policy), totals.sums["loss/policy"])
    assert [found[tokens][0] for tokens in found] == sorted({found[tokens][0] for tokens in found}, reverse=True)
    _, whole, whole_loss = found[10_000]
    for tokens in (64, 160):
        _, parts, loss = found[tokens]
        assert loss == pytest.approx(whole_loss, rel=1e-5)
        for name, gradient in whole.items():
            torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()) + 1e-9)


def test_a_mini_batch_of_equal_rewards_leaves_the_policy_alone(tmp_path: Path):
    recipe = make_recipe(tmp_path)
    policy = make_policy(recipe)
    samples = [
        Sample(s.index, s.prompt_token_ids, s.response_token_ids, 0.0, s.behaviour_log_probs) for s in make_samples()
    ]
    mini_batch = mini_batch_of(samples, recipe)
    before = [parameter.clone() for parameter in policy.models[0].parameters()]
    old = token_log_probs(policy.chunks, mini_batch.micro_batches, temperature=1.0)
    totals = update(policy, recipe, mini_batch, old)
    assert totals.sums["grad_norm"] == (0.0, 1)
    for parameter, was in zip(policy.models[0].parameters(), before, strict=True):
        assert torch.equal(parameter, was)


def test_the_first_update_after_the_old_policy_pass_has_ratio_one(tmp_path: Path):
    recipe = make_recipe(tmp_path)
    policy = make_policy(recipe)
    mini_batch = mini_batch_of(make_samples(), recipe)
    totals = Totals()
    baseline = baseline_log_probs(policy.chunks, None, [mini_batch], recipe, totals)
    totals = update(policy, recipe, mini_batch, baseline.old[0])
    # The same packing, kernels and weights: equal to the last bit.
    assert totals.maxima["ratio/token_abs_log_max"] == 0.0
    assert totals.sums["clip/token_fraction"][0] == 0.0


def test_tokens_of_an_environment_are_read_and_count_nowhere(tmp_path: Path):
    recipe = make_recipe(tmp_path, objective={"name": "gspo_token"})
    policy, whole = make_policy(recipe), make_samples()
    rng = np.random.default_rng(5)
    masks = [np.append(rng.random(len(sample.response_token_ids) - 1) < 0.5, True) for sample in whole]
    masked = [dataclasses.replace(sample, is_sampled=mask) for sample, mask in zip(whole, masks, strict=True)]
    experience = Experience((), (tuple(masked),), num_failed_rewards=0, rollout_s=0.0, reward_s=0.0)
    (mini_batch,) = plan_mini_batches(experience, recipe, pad_token_id=256)
    num_sampled = sum(int(mask.sum()) for mask in masks)
    assert mini_batch.num_tokens == num_sampled < sum(map(len, masks))

    found = by_sample(mini_batch, token_log_probs(policy.chunks, mini_batch.micro_batches, temperature=1.0))
    all_tokens = mini_batch_of(whole, recipe)
    expected = by_sample(all_tokens, token_log_probs(policy.chunks, all_tokens.micro_batches, temperature=1.0))
    for sample, mask in zip(whole, masks, strict=True):
        torch.testing.assert_close(found[sample.index], expected[sample.index][torch.from_numpy(mask)])

    old = [micro_batch.behaviour_log_probs for micro_batch in mini_batch.micro_batches]
    totals = update(policy, recipe, mini_batch, old)
    assert totals.sums["clip/token_fraction"][1] == totals.sums["ratio/token_log"][1] == num_sampled
    assert totals.sums["ratio/sequence_log"][1] == len(whole)
    assert totals.sums["entropy/mean"][1] == num_sampled


def by_sample(mini_batch: MiniBatch, log_probs: list[torch.Tensor]) -> dict[int, torch.Tensor]:
    return {
        index: values[start:end]
        for micro_batch, values in zip(mini_batch.micro_batches, log_probs, strict=True)
        for index, (start, end) in zip(
            micro_batch.sample_indices, pairwise(micro_batch.response_cu_seqlens.tolist()), strict=True
        )
    }


def test_a_non_finite_log_prob_skips_the_update_and_leaves_the_policy_alone(tmp_path: Path):
    recipe = make_recipe(tmp_path)
    policy = make_policy(recipe)
    mini_batch = mini_batch_of(make_samples(), recipe)
    old = token_log_probs(policy.chunks, mini_batch.micro_batches, temperature=1.0)
    old[1][2] = math.nan
    before = [parameter.clone() for parameter in policy.models[0].parameters()]
    skipped = SkippedUpdates(allowed_in_a_row=1)
    totals = Totals()
    loss = MiniBatchLoss(recipe, mini_batch, old, None)
    update_policy(policy, mini_batch, loss, skipped, 1, totals, measure_mismatch=False)
    assert skipped.total == 1
    assert "grad_norm" not in totals.sums
    for parameter, was in zip(policy.models[0].parameters(), before, strict=True):
        assert torch.equal(parameter, was)
    # The response that had it is named.
    assert loss.problem is not None
    assert str(mini_batch.micro_batches[1].sample_indices[0]) in loss.problem
    with pytest.raises(TrainingDivergedError, match="2 updates in a row"):
        update_policy(policy, mini_batch, loss, skipped, 1, totals, measure_mismatch=False)


def test_a_non_finite_gradient_skips_the_update(tmp_path: Path):
    recipe = make_recipe(tmp_path)
    policy = make_policy(recipe)
    mini_batch = mini_batch_of(make_samples(), recipe)
    old = token_log_probs(policy.chunks, mini_batch.micro_batches, temperature=1.0)
    weight = policy.models[0].decoder.layers[0].self_attention.linear_proj.weight
    handle = weight.register_hook(lambda gradient: gradient * math.inf)
    skipped = SkippedUpdates(3)
    totals = Totals()
    loss = MiniBatchLoss(recipe, mini_batch, old, None)
    update_policy(policy, mini_batch, loss, skipped, 1, totals, measure_mismatch=False)
    assert skipped.total == 1
    handle.remove()
    update_policy(policy, mini_batch, loss, skipped, 1, totals, measure_mismatch=False)
    assert (skipped.total, skipped.in_a_row) == (1, 0)


def test_a_gradient_whose_norm_overflows_skips_the_update(tmp_path: Path):
    recipe = make_recipe(tmp_path)
    policy = make_policy(recipe)
    mini_batch = mini_batch_of(make_samples(), recipe)
    old = token_log_probs(policy.chunks, mini_batch.micro_batches, temperature=1.0)
    # Each entry is finite; the sum of their squares is not.
    policy.models[0].decoder.final_layernorm.weight.register_hook(lambda gradient: gradient * 1e28)
    skipped = SkippedUpdates(3)
    loss = MiniBatchLoss(recipe, mini_batch, old, None)
    update_policy(policy, mini_batch, loss, skipped, 1, Totals(), measure_mismatch=False)
    assert skipped.total == 1


@pytest.mark.parametrize("objective", ["gspo", "gspo_token", "grpo"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_updates_make_good_responses_likelier_and_bad_ones_less_likely(
    objective: str, temperature: float, tmp_path: Path
):
    # Wide clip ranges, so that nothing stops the way the gradient points.
    recipe = make_recipe(
        tmp_path,
        objective={"name": objective, "clip_low": 0.9, "clip_high": 9.0},
        rollout={"temperature": temperature},
        training={"learning_rate": 0.003},
    )
    policy = make_policy(recipe)
    mini_batch = mini_batch_of(make_samples(), recipe)
    before = token_log_probs(policy.chunks, mini_batch.micro_batches, temperature=temperature)
    for _ in range(5):
        totals = update(policy, recipe, mini_batch, before)
        assert totals.sums["loss/policy"][1] == mini_batch.num_responses
    after = token_log_probs(policy.chunks, mini_batch.micro_batches, temperature=temperature)
    along_advantage = 0.0
    for micro_batch, old, new in zip(mini_batch.micro_batches, before, after, strict=True):
        bounds = micro_batch.response_cu_seqlens
        for advantage, start, end in zip(micro_batch.advantages, bounds, bounds[1:], strict=False):
            along_advantage += float(advantage * (new - old)[start:end].mean())
    assert along_advantage > 0.1


def test_log_probs_are_taken_at_the_sampling_temperature(tmp_path: Path):
    recipe = make_recipe(tmp_path, rollout={"temperature": 0.5})
    policy = make_policy(recipe)
    mini_batch = mini_batch_of(make_samples(), recipe)
    found = baseline_log_probs(policy.chunks, None, [mini_batch], recipe, Totals()).old[0]
    for micro_batch, log_probs in zip(mini_batch.micro_batches, found, strict=True):
        logits = policy.models[0].logits(micro_batch)[micro_batch.predicting_positions] / 0.5
        expected = logits.log_softmax(-1).gather(1, micro_batch.target_token_ids[:, None])[:, 0]
        torch.testing.assert_close(log_probs, expected, rtol=1e-5, atol=1e-5)
    # The update takes them at the same temperature, or its ratios would not be 1.
    assert update(policy, recipe, mini_batch, found).maxima["ratio/token_abs_log_max"] == 0.0


def test_the_reference_policy_is_the_one_the_run_started_from_and_stands_still(tmp_path: Path):
    recipe = make_recipe(tmp_path, objective={"kl_coefficient": 0.1}, training={"learning_rate": 0.01})
    models = build_models(recipe)
    reference = frozen_copy(models, recipe)
    policy = build_trainable_policy(models, recipe, reinforcement_learning_rate(recipe))
    mini_batch = mini_batch_of(make_samples(), recipe)
    baseline = baseline_log_probs(policy.chunks, reference, [mini_batch], recipe, Totals())
    assert baseline.reference is not None
    for old, same in zip(baseline.old[0], baseline.reference[0], strict=True):
        assert torch.equal(old, same)
    kl = []
    for _ in range(3):
        totals = Totals()
        loss = MiniBatchLoss(recipe, mini_batch, baseline.old[0], baseline.reference[0])
        update_policy(policy, mini_batch, loss, SkippedUpdates(0), 1, totals, measure_mismatch=False)
        kl.append(totals.sums["loss/kl"][0])
    assert kl[0] == 0.0 < kl[1]
    later = baseline_log_probs(policy.chunks, reference, [mini_batch], recipe, Totals())
    assert later.reference is not None
    for first, again in zip(baseline.reference[0], later.reference[0], strict=True):
        assert torch.equal(first, again)


def test_the_learning_rate_rises_over_the_warm_up_and_no_update_is_thrown_away(tmp_path: Path):
    recipe = make_recipe(tmp_path, training={"warmup_updates": 3, "learning_rate": 1e-3})
    policy = make_policy(recipe)
    rates = []
    for _ in range(6):
        rates.append(policy.learning_rate)
        policy.scheduler.step(1)
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])


def test_a_rank_without_responses_keeps_step(tmp_path: Path):
    recipe = make_recipe(tmp_path)
    policy = make_policy(recipe)
    mini_batch = MiniBatch(pack_samples([], recipe, pad_token_id=256), num_responses=8, num_tokens=64)
    totals = update(policy, recipe, mini_batch, [torch.zeros(0)])
    assert totals.sums["grad_norm"] == (0.0, 1)
