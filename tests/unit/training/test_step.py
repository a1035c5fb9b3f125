"""One policy update on the real model: what the gradient depends on, and what stops it."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_gspo.config import Recipe, load_recipe
from megatron_gspo.training.assembly import build_models, reinforcement_learning_rate
from megatron_gspo.training.experience import MiniBatch, pack_samples
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
