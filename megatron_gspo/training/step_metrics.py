"""What is measured of a step beside the loss: rewards, responses, packing, time, throughput, memory.

In: the step's experience and mini-batches, and a stopwatch. Out: entries in `Totals`, and metrics.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from megatron_gspo.environment import peak_memory_gib
from megatron_gspo.training.evaluation import SOLVED_REWARD
from megatron_gspo.training.experience import Experience, MiniBatch
from megatron_gspo.training.staleness import record_staleness
from megatron_gspo.training.totals import Totals


@dataclass
class Stopwatch:
    """Wall-clock seconds by stage, on this rank."""

    started: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the time of the block to `stage`."""
        started = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started

    def since_start(self) -> float:
        """Seconds since the stopwatch was made."""
        return time.perf_counter() - self.started


def record_experience(experience: Experience, mini_batches: list[MiniBatch], token_budget: int, totals: Totals) -> None:
    """Measure rewards, groups and responses of this data-parallel rank: of all that were scored, dropped ones too."""
    for group in experience.groups:
        totals.add("groups/zero_variance_fraction", float(not group.teaches), 1)
        totals.add("reward/mean", float(group.rewards.sum()), len(group.rewards))
        totals.add("reward/square_mean", float((group.rewards.astype(float) ** 2).sum()), len(group.rewards))
        totals.add("reward/solved_fraction", float((group.rewards >= SOLVED_REWARD).sum()), len(group.rewards))
        if group.penalties is not None:
            totals.add("reward/overlong_penalty_mean", float(group.penalties.sum()), len(group.penalties))
        for response in group.responses:
            totals.add("response/length_mean", response.num_sampled_tokens, 1)
            if response.is_sampled is not None:
                totals.add("response/turns_mean", response.num_turns, 1)
                observed = len(response.token_ids) - response.num_sampled_tokens
                totals.add("response/observation_tokens_mean", observed, 1)
            totals.add("response/truncated_fraction", response.finish_reason == "length", 1)
            totals.count("tokens", len(response.token_ids) + len(group.prompt.token_ids))
    for sample in (sample for samples in experience.samples for sample in samples):
        if sample.staleness is not None:
            record_staleness(sample.staleness, totals)
    totals.count("reward/num_failed", experience.num_failed_rewards)
    for name, number in experience.engine_counts.items():
        totals.count(name, number)
    for mini_batch in mini_batches:
        totals.add("packing/rank_token_imbalance", mini_batch.rank_token_imbalance, 1)
        num_passed = sum(micro_batch.num_responses for micro_batch in mini_batch.micro_batches)
        totals.add("packing/skipped_fraction", len(mini_batch.skipped), len(mini_batch.skipped) + num_passed)
    for micro_batch in (micro_batch for mini_batch in mini_batches for micro_batch in mini_batch.micro_batches):
        packed = len(micro_batch.token_ids) - micro_batch.num_padding_tokens
        totals.add("packing/fill_fraction", packed, max(token_budget, packed))


def with_reward_spread(metrics: dict[str, float]) -> dict[str, float]:
    """Add `reward/std`, the standard deviation over all responses of the step, in place of the second moment."""
    variance = metrics.pop("reward/square_mean") - metrics["reward/mean"] ** 2
    return metrics | {"reward/std": math.sqrt(max(variance, 0.0))}


def timings(clock: Stopwatch, experience: Experience, combined: Totals) -> dict[str, float]:
    """Seconds by stage, and tokens (prompts and responses, of all ranks) a second of the whole step."""
    seconds = {"rollout": experience.rollout_s, "reward": experience.reward_s} | clock.seconds
    total_s = experience.rollout_s + experience.reward_s + clock.since_start()
    return {f"time/{name}_s": value for name, value in seconds.items()} | {
        "time/step_s": total_s,
        "throughput/tokens_per_s": combined.counts["tokens"] / total_s,
        "memory/peak_gib": peak_memory_gib(),
    }
