"""Each warning fires on a run that deserves it, and not on one that does not."""

import re

import numpy as np
import pytest

from megatron_gspo.report import warnings
from megatron_gspo.report.read import Series
from tests.run_directories import record

ENGINE = {"rollout.old_log_probs": "engine"}
R2 = {"routing.replay": "r2"}

#: check, what the run does to deserve it, a word of the message, and what comes near without deserving it
CASES = [
    (
        warnings.clip_range_never_clips,
        {"changes": {"clip/token_fraction": 0.0}, "recipe": {"objective.clip_low": 0.2, "objective.clip_high": 0.27}},
        r"nothing was clipped in 40 steps.*0\.01.*begins at 0\.22.*3e-4",
        {"changes": {"clip/token_fraction": 0.0}, "recipe": {"objective.clip_low": 0.015, "objective.clip_high": 0.02}},
    ),
    (
        warnings.clip_range_below_mismatch,
        {"changes": {"mismatch/sequence_log_std": 0.02}, "recipe": ENGINE},
        r"0\.02 already, the clip range is 0\.0003",
        {"changes": {"mismatch/sequence_log_std": 1e-4}, "recipe": ENGINE},
    ),
    (
        warnings.replay_not_in_force,
        {"changes": {"routing/replayed_token_fraction": lambda step: 0.5 if step == 7 else 1.0}, "recipe": R2},
        r"r2, but in 1 of 40 steps.*50\.0%; first at step 7",
        {"changes": {"routing/replayed_token_fraction": 1.0}, "recipe": R2},
    ),
    (
        warnings.change_at_noise_floor,
        {"changes": {"routing/change_rate": 0.0019}},
        r"0\.190%.*floor, 0\.100%",
        {"changes": {"routing/change_rate": 0.0021}},
    ),
    (
        warnings.mismatch_rises,
        {"changes": {"mismatch/log_prob_abs_mean": lambda step: 1e-3 * 1.05**step}},
        r"drift from the trainer's: 0\.0013 nats.*0\.0057",
        {"changes": {"mismatch/log_prob_abs_mean": lambda step: 1e-7 * 1.05**step}},  # float32's own round-off
    ),
    (
        warnings.entropy_collapses,
        {"changes": {"entropy/mean": lambda step: 0.5 * 0.8**step}},
        r"entropy fell from .* first at step 13\)",
        {"changes": {"entropy/mean": lambda step: 0.5 * 0.96**step}},
    ),
    (
        warnings.gradient_spikes,
        {"changes": {"grad_norm": lambda step: 9.0 if step in (12, 30) else 0.2}},
        r"steps 12, 30; the largest is 9, at step 12",
        {"changes": {"grad_norm": lambda step: 1.5 if step in (12, 30) else 0.2}},
    ),
    (
        warnings.reward_collapses,
        {"changes": {"reward/mean": lambda step: 0.2 + 0.02 * step if step <= 25 else 0.1}},
        r"fell from 0\.660 to 0\.100.*began at step 27",
        {"changes": {"reward/mean": lambda step: 0.5 + (0.03 if step % 4 < 2 else -0.03)}},
    ),
    (
        warnings.groups_without_variance,
        {"changes": {"groups/zero_variance_fraction": lambda step: 0.9 if step > 30 else 0.1}},
        r"90% of the groups.*too easy",
        {"changes": {"groups/zero_variance_fraction": lambda step: 0.9 if step < 25 else 0.1}},
    ),
    (
        warnings.values_not_finite,
        {"changes": {"updates/num_skipped": lambda step: float(step > 20)}},
        r"1 updates were skipped",
        {"changes": {"updates/num_skipped": 0.0}},
    ),
]


@pytest.mark.parametrize(("check", "wrong", "message", "right"), CASES, ids=[case[0].__name__ for case in CASES])
def test_a_check_fires_where_it_should_and_only_there(check, wrong, message, right):
    found = check(record(**wrong))
    assert found is not None
    assert re.search(message, found), found
    assert check(record(**right)) is None


def test_every_check_is_tested_here_and_none_fires_on_a_healthy_run():
    assert {check.find for check in warnings.CHECKS} == {case[0] for case in CASES}
    assert warnings.check_run(record()) == []


def test_a_null_in_the_metrics_is_named_with_its_step():
    run = record(steps=5)
    run.lines[3]["grad_norm"] = None
    assert warnings.values_not_finite(run) == "not finite: grad_norm at step 3"


def test_the_trainers_own_old_log_probs_do_not_clip_on_the_engines_noise():
    assert warnings.clip_range_below_mismatch(record(changes={"mismatch/sequence_log_std": 0.02})) is None


def test_a_token_objective_is_judged_by_the_tokens_ratio():
    grpo = {"objective.name": "grpo", "objective.clip_low": 0.2, "objective.clip_high": 0.27}
    changes = {"mismatch/token_log_std": 0.3, "mismatch/sequence_log_std": 1e-5}
    found = warnings.clip_range_below_mismatch(record(changes=changes, recipe=grpo | ENGINE))
    assert found is not None
    assert "token log-ratio is spread by 0.3" in found


def test_replay_that_was_never_measured_is_not_in_force():
    found = warnings.replay_not_in_force(record(changes={"routing/replayed_token_fraction": None}, recipe=R2))
    assert found is not None
    assert "in 40 of 40 steps" in found


def test_one_mini_batch_never_clips_and_needs_not():
    wide = {"objective.clip_low": 0.2, "objective.clip_high": 0.27, "training.mini_batches": 1}
    assert warnings.clip_range_never_clips(record(changes={"clip/token_fraction": 0.0}, recipe=wide)) is None


@pytest.mark.parametrize("seed", range(50))
def test_noise_alone_is_no_collapse(seed):
    noise = np.random.default_rng(seed).normal(0.5, 0.05, 200)
    assert warnings.find_collapse(Series(np.arange(200), noise)) is None
