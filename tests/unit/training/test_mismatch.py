"""How far the engine's likelihoods are from the trainer's, measured by the old-policy pass."""

import dataclasses
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_gspo.policy_loss import finalize_metrics
from megatron_gspo.training.forward import token_log_probs
from megatron_gspo.training.old_policy import baseline_log_probs
from megatron_gspo.training.totals import Totals
from megatron_gspo.types import Sample
from tests.one_update import (
    make_policy,
    make_recipe,
    make_samples,
    mini_batch_of,
)

pytestmark = pytest.mark.usefixtures("_one_rank")


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
