"""What a step reports of its responses, against numbers worked out by hand."""

import numpy as np
import pytest

from megatron_gspo.policy_loss import finalize_metrics
from megatron_gspo.training.experience import Experience
from megatron_gspo.training.step_metrics import record_experience, with_reward_spread
from megatron_gspo.training.totals import Totals
from megatron_gspo.types import FinishReason, Group, Prompt, Response


def response(num_tokens: int, finish_reason: FinishReason) -> Response:
    return Response("p", np.zeros(num_tokens, np.int64), np.zeros(num_tokens, np.float32), finish_reason, 0)


def test_rewards_lengths_and_groups_are_counted():
    prompt = Prompt("p", (1, 2, 3), "", "")
    mixed = Group(
        prompt,
        (response(4, "stop"), response(10, "length")),
        np.array([1.0, 0.0], np.float32),
        np.array([1.0, -1.0], np.float32),
    )
    equal = Group(
        prompt,
        (response(6, "stop"), response(8, "stop")),
        np.array([0.5, 0.5], np.float32),
        np.zeros(2, np.float32),
    )
    experience = Experience((mixed, equal), (), num_failed_rewards=3, rollout_s=0.0, reward_s=0.0)
    totals = Totals()
    record_experience(experience, [], 128, totals)
    metrics = with_reward_spread(finalize_metrics(totals.sums))
    assert metrics["reward/mean"] == 0.5
    assert metrics["reward/std"] == pytest.approx(np.std([1.0, 0.0, 0.5, 0.5]))
    assert metrics["reward/solved_fraction"] == 0.25
    assert metrics["groups/zero_variance_fraction"] == 0.5
    assert metrics["response/length_mean"] == 7.0
    assert metrics["response/truncated_fraction"] == 0.25
    assert totals.counts == {"tokens": 28 + 4 * 3, "reward/num_failed": 3}
