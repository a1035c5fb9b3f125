"""From a step's prompts to scored groups, and from those to packed mini-batches.

In: prompts, and the data leader's rollout engine and reward. Out: for every data-parallel rank its share of each mini-batch, as
micro-batches of packed tokens, with the denominators of the whole mini-batch.

Mini-batch j of m takes the step's prompts [j·P/m, (j + 1)·P/m), and data-parallel rank r of d samples and scores the
r-th of d equal parts of those: so what a mini-batch holds does not depend on the number of ranks, and a group's
advantages are computed where all of it is. Then the mini-batch's responses are shared out anew, by their tokens
(`balance`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_gspo import parallel
from megatron_gspo.config import Recipe
from megatron_gspo.context_parallel import pad_multiples
from megatron_gspo.data.packing import pack, plan_micro_batches
from megatron_gspo.platform import device
from megatron_gspo.policy_loss import group_advantages, resolve_objective, token_advantages
from megatron_gspo.training.agreement import unless_an_engine_is_gone
from megatron_gspo.training.balance import rebalance, token_imbalance
from megatron_gspo.training.rollouts import Rollouts
from megatron_gspo.types import Group, MicroBatch, Prompt, Response, Sample, SamplingSettings


@dataclass(frozen=True)
class Experience:
    """One step's share of this data-parallel rank: what it sampled, what it trains on, and what making it cost."""

    groups: tuple[Group, ...]  # as this rank sampled and scored them; their routes went with the samples
    samples: tuple[tuple[Sample, ...], ...]  # by mini-batch, from any rank's groups
    num_failed_rewards: int
    rollout_s: float
    reward_s: float
    engine_counts: Mapping[str, float] = field(default_factory=dict)  # what happened to the engine, by metric name

    @classmethod
    def of(
        cls,
        mini_batches: Sequence[Sequence[Group]],
        first_sample: Sequence[int],
        *,
        num_failed_rewards: int,
        rollout_s: float,
        reward_s: float,
        engine_counts: Mapping[str, float] | None = None,
    ) -> Experience:
        """Share out what every rank sampled. A collective among data-parallel ranks.

        Args:
            mini_batches: this rank's groups, by mini-batch.
            first_sample: index in the step of each mini-batch's first response on this rank.
        """
        samples = [_samples(groups, first) for groups, first in zip(mini_batches, first_sample, strict=True)]
        return cls(
            groups=tuple(_without_routes(group) for groups in mini_batches for group in groups),
            samples=rebalance(samples),
            num_failed_rewards=num_failed_rewards,
            rollout_s=rollout_s,
            reward_s=reward_s,
            engine_counts=engine_counts or {},
        )

    def routed_experts(self) -> dict[int, np.ndarray | None]:
        """The rollout engine's routes of each sample, by `Sample.index`."""
        return {sample.index: sample.routed_experts for samples in self.samples for sample in samples}


@dataclass(frozen=True)
class MiniBatch:
    """What one policy update learns from, on this rank; the counts are of all ranks."""

    micro_batches: tuple[MicroBatch, ...]
    num_responses: int
    num_tokens: int
    rank_token_imbalance: float = 1.0  # tokens of the most loaded data-parallel rank over the mean


def collect_experience(
    prompts: Sequence[Prompt], rollouts: Rollouts | None, recipe: Recipe, settings: SamplingSettings
) -> Experience:
    """Sample and score this data-parallel rank's groups.

    The data leader does it (`rollouts` is None elsewhere); the others of its model-parallel group get them from it.

    Raises:
        OutageError: a data leader's engine is gone; on every rank.
    """
    shares, first_sample = prompt_shares(len(prompts), recipe)
    experience = None
    own = [prompts[position] for share in shares for position in share]
    group_size = recipe.rollout.responses_per_prompt
    scored = unless_an_engine_is_gone(
        lambda: None if rollouts is None else rollouts.sample_and_score(own, group_size, settings)
    )
    if scored is not None:
        groups = iter(
            _group(prompt, responses, rewards, recipe)
            for prompt, responses, rewards in zip(own, scored.responses, scored.rewards, strict=True)
        )
        experience = Experience.of(
            [[next(groups) for _ in share] for share in shares],
            first_sample,
            num_failed_rewards=scored.num_failed_rewards,
            rollout_s=scored.rollout_s,
            reward_s=scored.reward_s,
            engine_counts=scored.engine_counts,
        )
    return parallel.broadcast_from_data_leader(experience)


def plan_mini_batches(experience: Experience, recipe: Recipe, pad_token_id: int) -> list[MiniBatch]:
    """Pack every mini-batch's responses into micro-batches: the step's plan, which each of its passes uses."""
    planned = []
    for samples in experience.samples:
        counts = parallel.sum_over_data_ranks(
            [float(len(samples)), float(sum(sample.num_sampled_tokens for sample in samples))]
        )
        planned.append(
            MiniBatch(
                micro_batches=pack_samples(samples, recipe, pad_token_id),
                num_responses=round(counts[0]),
                num_tokens=round(counts[1]),
                rank_token_imbalance=token_imbalance(samples),
            )
        )
    return planned


def pack_samples(
    samples: Sequence[Sample], recipe: Recipe, pad_token_id: int, *, token_budget: int | None = None
) -> tuple[MicroBatch, ...]:
    """Pack samples to the token budget (default: the recipe's); all data-parallel ranks get equally many micro-batches.

    Experts are spread over data-parallel ranks, so a rank with fewer must keep step: it adds micro-batches without a
    response. Interleaved pipelines take micro-batches in rounds of the pipeline's size.
    """
    budget = recipe.training.tokens_per_micro_batch if token_budget is None else token_budget
    segment_multiple, multiple = pad_multiples(recipe.parallel.tensor, recipe.parallel.context)
    plan = plan_micro_batches([-(-s.num_tokens // segment_multiple) * segment_multiple for s in samples], budget)
    count = max(1, parallel.max_over_data_ranks(len(plan)))
    if recipe.parallel.virtual_pipeline is not None:
        count += -count % recipe.parallel.pipeline
    plan = plan + [[] for _ in range(count - len(plan))]
    return tuple(
        pack(
            [samples[index] for index in indices],
            pad_to_multiple=multiple,
            pad_token_id=pad_token_id,
            device=device(),
            pad_segments_to_multiple=segment_multiple,
        )
        for indices in plan
    )


def prompt_shares(num_prompts: int, recipe: Recipe) -> tuple[list[range], list[int]]:
    """This rank's prompt positions in each mini-batch, and the index of the first response of each."""
    per_mini_batch = num_prompts // recipe.training.mini_batches
    per_rank = per_mini_batch // parallel.data_size()
    assert per_rank * parallel.data_size() * recipe.training.mini_batches == num_prompts, (
        "the recipe's check holds this"
    )
    starts = [
        mini_batch * per_mini_batch + parallel.data_rank() * per_rank
        for mini_batch in range(recipe.training.mini_batches)
    ]
    return (
        [range(start, start + per_rank) for start in starts],
        [start * recipe.rollout.responses_per_prompt for start in starts],
    )


def _group(prompt: Prompt, responses: tuple[Response, ...], rewards: np.ndarray, recipe: Recipe) -> Group:
    """With advantages: of each token, where rewards came on the way and the objective takes them, beside each response's."""
    normalization = recipe.objective.advantage_normalization
    advantages = group_advantages(rewards, normalization)
    on_the_way = [response.token_rewards for response in responses if response.token_rewards is not None]
    if not any(own.any() for own in on_the_way) or not resolve_objective(recipe.objective.name).takes_token_advantages:
        return Group(prompt, responses, rewards, advantages)
    return Group(prompt, responses, rewards, advantages, tuple(token_advantages(rewards, on_the_way, normalization)))


def _samples(groups: Sequence[Group], first_sample: int) -> list[Sample]:
    parts = [
        (group, response, float(advantage), group.token_advantages[number] if group.token_advantages else None)
        for group in groups
        for number, (response, advantage) in enumerate(zip(group.responses, group.advantages, strict=True))
    ]
    return [
        Sample(
            index=first_sample + offset,
            prompt_token_ids=np.asarray(group.prompt.token_ids, dtype=np.int64),
            response_token_ids=response.token_ids,
            advantage=advantage,
            behaviour_log_probs=response.log_probs,
            routed_experts=response.routed_experts,
            is_sampled=response.is_sampled,
            token_advantages=of_tokens,
        )
        for offset, (group, response, advantage, of_tokens) in enumerate(parts)
    ]


def _without_routes(group: Group) -> Group:
    """The group as rewards and lengths are measured from it: routes are large, and travel once."""
    return replace(group, responses=tuple(replace(response, routed_experts=None) for response in group.responses))
