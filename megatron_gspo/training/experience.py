"""From a step's prompts to scored groups, and from those to packed mini-batches.

In: prompts, and the data leader's rollout engine and reward. Out: for every data-parallel rank its share of each mini-batch, as
micro-batches of packed tokens, with the denominators of the whole mini-batch.

Mini-batch j of m takes the step's prompts [j·P/m, (j + 1)·P/m), and data-parallel rank r of d samples and scores the
r-th of d equal parts of those: so what a mini-batch holds does not depend on the number of ranks, and a group's
advantages are computed where all of it is. Then the mini-batch's responses are shared out anew, by their tokens
(`balance`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_gspo import parallel
from megatron_gspo.config import Recipe
from megatron_gspo.context_parallel import pad_multiples
from megatron_gspo.data.packing import pack, plan_micro_batches
from megatron_gspo.platform import device
from megatron_gspo.policy_loss import OBJECTIVES, group_advantages
from megatron_gspo.training.balance import rebalance, token_imbalance
from megatron_gspo.training.rollouts import Rollouts
from megatron_gspo.types import Group, MicroBatch, Prompt, Sample, SamplingSettings


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
        is_learned_from: Callable[[Sample], bool] = lambda _: True,
    ) -> Experience:
        """Share out what every rank sampled. A collective among data-parallel ranks.

        Args:
            mini_batches: this rank's groups, by mini-batch.
            first_sample: index in the step of each mini-batch's first response on this rank.
            is_learned_from: whether the updates pass a sample through the model.
        """
        samples = [_samples(groups, first) for groups, first in zip(mini_batches, first_sample, strict=True)]
        return cls(
            groups=tuple(_without_routes(group) for groups in mini_batches for group in groups),
            samples=rebalance(samples, is_learned_from),
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
    """What one policy update learns from, on this rank; the counts are of all ranks, and of skipped responses too."""

    micro_batches: tuple[MicroBatch, ...]
    num_responses: int
    num_tokens: int
    skipped: tuple[Sample, ...] = ()  # this rank's that are in none of the micro-batches
    rank_token_imbalance: float = 1.0  # tokens of the most loaded data-parallel rank over the mean


def collect_experience(
    prompts: Sequence[Prompt], rollouts: Rollouts | None, recipe: Recipe, settings: SamplingSettings
) -> Experience:
    """Sample and score this data-parallel rank's groups.

    The data leader does it (`rollouts` is None elsewhere); the others of its model-parallel group get them from it.
    """
    shares, first_sample = prompt_shares(len(prompts), recipe)
    experience = None
    if rollouts is not None:
        own = [prompts[position] for share in shares for position in share]
        scored = rollouts.sample_and_score(own, recipe.rollout.responses_per_prompt, settings)
        groups = iter(
            Group(prompt, responses, rewards, _advantages(rewards, recipe))
            for prompt, responses, rewards in zip(own, scored.responses, scored.rewards, strict=True)
        )
        experience = Experience.of(
            [[next(groups) for _ in share] for share in shares],
            first_sample,
            num_failed_rewards=scored.num_failed_rewards,
            rollout_s=scored.rollout_s,
            reward_s=scored.reward_s,
            engine_counts=scored.engine_counts,
            is_learned_from=lambda sample: is_learned_from(sample, recipe),
        )
    return parallel.broadcast_from_data_leader(experience)


def plan_mini_batches(experience: Experience, recipe: Recipe, pad_token_id: int) -> list[MiniBatch]:
    """Pack every mini-batch's responses into micro-batches: the step's plan, which each of its passes uses.

    Responses that teach nothing (`is_learned_from`) are left out of it, and out of no denominator.
    """
    planned = []
    for samples in experience.samples:
        learned_from = [sample for sample in samples if is_learned_from(sample, recipe)]
        num_tokens = sum(len(sample.response_token_ids) for sample in samples)
        counts = parallel.sum_over_data_ranks([float(len(samples)), float(num_tokens), float(len(learned_from))])
        if counts[2] == 0:  # ratios and entropy are then measured on what there is, not on nothing
            learned_from = list(samples)
        passed = {sample.index for sample in learned_from}
        planned.append(
            MiniBatch(
                micro_batches=pack_samples(learned_from, recipe, pad_token_id),
                num_responses=round(counts[0]),
                num_tokens=round(counts[1]),
                skipped=tuple(sample for sample in samples if sample.index not in passed),
                rank_token_imbalance=token_imbalance(learned_from),
            )
        )
    return planned


def is_learned_from(sample: Sample, recipe: Recipe) -> bool:
    """Whether a sample can change the gradient, or is to be passed through the model whether it can or not.

    At advantage 0 the paper's surrogates (eqs. 2, 6, 14) are 0 at every ratio, and so is their gradient. A KL penalty has
    one there, and of an objective of one's own nothing is known.
    """
    objective = recipe.objective
    must_pass = objective.kl_coefficient != 0 or objective.name not in OBJECTIVES
    return sample.advantage != 0 or must_pass or not recipe.training.skip_zero_advantages


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


def _advantages(rewards: np.ndarray, recipe: Recipe) -> np.ndarray:
    return group_advantages(rewards, recipe.objective.advantage_normalization)


def _samples(groups: Sequence[Group], first_sample: int) -> list[Sample]:
    pairs = [
        (group, response, float(advantage))
        for group in groups
        for response, advantage in zip(group.responses, group.advantages, strict=True)
    ]
    return [
        Sample(
            index=first_sample + offset,
            prompt_token_ids=np.asarray(group.prompt.token_ids, dtype=np.int64),
            response_token_ids=response.token_ids,
            advantage=advantage,
            behaviour_log_probs=response.log_probs,
            routed_experts=response.routed_experts,
        )
        for offset, (group, response, advantage) in enumerate(pairs)
    ]


def _without_routes(group: Group) -> Group:
    """The group as rewards and lengths are measured from it: routes are large, and travel once."""
    return replace(group, responses=tuple(replace(response, routed_experts=None) for response in group.responses))
