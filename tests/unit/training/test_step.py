"""One policy update on the real model: what the gradient depends on, and what stops it."""

import dataclasses
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_gspo.config import Recipe, load_recipe
from megatron_gspo.policy_loss import finalize_metrics
from megatron_gspo.training.assembly import build_models, frozen_copy, reinforcement_learning_rate
from megatron_gspo.training.experience import Experience, MiniBatch, pack_samples, plan_mini_batches
from megatron_gspo.training.forward import token_log_probs
from megatron_gspo.training.guards import SkippedUpdates, TrainingDivergedError
from megatron_gspo.training.old_policy import baseline_log_probs
from megatron_gspo.training.optimizer import TrainablePolicy, build_trainable_policy
from megatron_gspo.training.step import MiniBatchLoss, update_policy
from megatron_gspo.training.totals import Totals
from megatron_gspo.types import Sample
from tests.tiny_model import tiny_recipe, write_tiny_model

pytestmark = pytest.mark.usefixtures("_one_rank")


def make_recipe(path: Path, **sections: dict) -> Recipe:
    write_tiny_model(path / "model")
    (path / "recipe.yaml").write_text(tiny_recipe(path / "model", **sections))
    return load_recipe(path / "recipe.yaml")


def make_policy(recipe: Recipe) -> TrainablePolicy:
    return build_trainable_policy(build_models(recipe), recipe, reinforcement_learning_rate(recipe))


def make_samples(num_samples: int = 12, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(num_samples):
        prompt, response = rng.integers(3, 12), rng.integers(2, 24)
        samples.append(
            Sample(
                index=index,
                prompt_token_ids=rng.integers(0, 256, prompt),
                response_token_ids=rng.integers(0, 256, response),
                advantage=float(rng.normal()),
                behaviour_log_probs=np.full(response, -5.0, dtype=np.float32),
            )
        )
    return samples


def mini_batch_of(samples: list[Sample], recipe: Recipe) -> MiniBatch:
    num_tokens = sum(len(sample.response_token_ids) for sample in samples)
    return MiniBatch(pack_samples(samples, recipe, pad_token_id=256), len(samples), num_tokens)


def with_budget(recipe: Recipe, tokens: int) -> Recipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"tokens_per_micro_batch": tokens})})


def gradients(policy: TrainablePolicy) -> dict[str, torch.Tensor]:
    return {name: parameter.main_grad.clone() for name, parameter in policy.models[0].named_parameters()}


def update(policy: TrainablePolicy, recipe: Recipe, mini_batch: MiniBatch, old: list[torch.Tensor]) -> Totals:
    totals = Totals()
    loss = MiniBatchLoss(recipe, mini_batch, old, None)
    update_policy(policy, mini_batch, loss, SkippedUpdates(3), 1, totals, measure_mismatch=False)
    return totals


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
        # Old log-probs a little off the current ones, so that ratios differ from 1 and some are clipped.
        generator = torch.Generator().manual_seed(1)
        shift = {s.index: torch.randn(len(s.response_token_ids), generator=generator) * 0.3 for s in samples}
        current = token_log_probs(policy.chunks, mini_batch.micro_batches, temperature=1.0)
        old = [
            log_probs + torch.cat([shift[index] for index in micro_batch.sample_indices])
            for log_probs, micro_batch in zip(current, mini_batch.micro_batches, strict=True)
        ]
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
        generator = torch.Generator().manual_seed(1)
        shift = {s.index: torch.randn(len(s.response_token_ids), generator=generator) * 0.3 for s in samples}
        current = token_log_probs(policy.chunks, mini_batch.micro_batches, temperature=1.0)
        old = [
            log_probs + torch.cat([shift[index] for index in micro_batch.sample_indices])
            for log_probs, micro_batch in zip(current, mini_batch.micro_batches, strict=True)
        ]
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


def test_the_engine_mismatch_is_the_distance_of_the_two_log_probs(tmp_path: Path):
    recipe = make_recipe(tmp_path)
    policy = make_policy(recipe)
    mini_batch = mini_batch_of(make_samples(), recipe)
    totals = Totals()
    baseline = baseline_log_probs(policy.chunks, None, [mini_batch], recipe, totals)
    difference = torch.cat(baseline.old[0]).double().numpy() + 5.0  # the samples' behaviour log-probs are -5
    total, count = totals.sums["mismatch/log_prob_abs_mean"]
    assert total / count == pytest.approx(np.abs(difference).mean())
    total, count = totals.sums["mismatch/kl"]
    assert total / count == pytest.approx((np.exp(difference) - 1 - difference).mean())
    bounds = np.cumsum(
        [0, *(length for mb in mini_batch.micro_batches for length in mb.response_cu_seqlens.diff().tolist())]
    )
    means = np.array([difference[start:end].mean() for start, end in pairwise(bounds) if end > start])
    metrics = finalize_metrics(totals.sums)
    assert metrics["mismatch/token_log_std"] == pytest.approx(difference.std())
    assert metrics["mismatch/sequence_log_std"] == pytest.approx(means.std())
    assert len(means) > 1
    assert "mismatch/stale_log_prob_abs_mean" not in metrics


def test_responses_that_older_weights_began_are_left_out_of_the_engine_mismatch(tmp_path: Path):
    recipe = make_recipe(tmp_path)
    policy = make_policy(recipe)
    samples = [
        dataclasses.replace(sample, staleness=np.arange(len(sample.response_token_ids))[::-1] // 3 + sample.index % 3)
        if sample.index % 2
        else sample
        for sample in make_samples()
    ]
    mini_batch = mini_batch_of(samples, recipe)
    totals = Totals()
    baseline = baseline_log_probs(policy.chunks, None, [mini_batch], recipe, totals)
    own = {  # log-probs of each sample, by a pass of its own
        sample.index: token_log_probs(policy.chunks, mini_batch_of([sample], recipe).micro_batches, temperature=1.0)[0]
        for sample in samples
    }
    distances = {index: log_probs.double().numpy() + 5.0 for index, log_probs in own.items()}
    fresh = np.concatenate([distances[s.index] for s in samples if _staleness(s)[0] == 0])
    stale = np.concatenate([distances[s.index] for s in samples if _staleness(s)[0] > 0])
    metrics = finalize_metrics(totals.sums)
    assert metrics["mismatch/log_prob_abs_mean"] == pytest.approx(np.abs(fresh).mean(), rel=1e-4)
    assert metrics["mismatch/stale_log_prob_abs_mean"] == pytest.approx(np.abs(stale).mean(), rel=1e-4)
    means = [distances[s.index].mean() for s in samples if not _staleness(s).any()]
    assert 1 < len(means) < len(samples)
    assert metrics["mismatch/sequence_log_std"] == pytest.approx(np.std(means), rel=1e-3)
    assert len(baseline.old[0]) == len(mini_batch.micro_batches)


def _staleness(sample: Sample) -> np.ndarray:
    return np.zeros(len(sample.response_token_ids)) if sample.staleness is None else sample.staleness


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
    policy.models[0].output_layer.weight.register_hook(lambda gradient: gradient * 1e28)
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
