"""From a step's scored groups to packed mini-batches.

In: the groups that each data leader sampled and scored (`collector`), with their places in the step. Out: for every
data-parallel rank its share of each mini-batch, as micro-batches of packed tokens, with the denominators of the whole
mini-batch.

Mini-batch j of m takes the groups at places [j·P/m, (j + 1)·P/m) of the step's P, wherever they were sampled: what a
mini-batch holds does not depend on the number of ranks, and a group's advantages are computed where all of it is. Then
the mini-batch's responses are shared out anew, by their tokens (`balance`).
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
from megatron_gspo.policy_loss import OBJECTIVES
from megatron_gspo.training.balance import rebalance, token_imbalance
from megatron_gspo.types import Group, MicroBatch, Sample


@dataclass(frozen=True)
class Experience:
    """One step's share of this data-parallel rank: what it sampled, what it trains on, and what making it cost."""

    groups: tuple[Group, ...]  # all that this rank scored in the step; their routes went with the samples
    samples: tuple[tuple[Sample, ...], ...]  # by mini-batch, from any rank's groups
    num_failed_rewards: int
    rollout_s: float
    reward_s: float
    engine_counts: Mapping[str, float] = field(default_factory=dict)  # what happened to the engine, by metric name

    @classmethod
    def of(
        cls,
        groups_by_place: Mapping[int, Group],
        recipe: Recipe,
        *,
        version: int,
        num_failed_rewards: int,
        rollout_s: float,
        reward_s: float,
        dropped: Sequence[Group] = (),
        engine_counts: Mapping[str, float] | None = None,
    ) -> Experience:
        """Share out what every rank sampled. A collective among data-parallel ranks.

        Args:
            groups_by_place: this rank's groups, by their places among the step's prompts.
            recipe: says what places make up a mini-batch, and which samples updates pass through the model.
            version: of the policy that learns from them.
            dropped: what this rank scored besides, and nobody learns from.
        """
        training = recipe.training
        per_mini_batch = training.prompts_per_step // training.mini_batches
        samples: list[list[Sample]] = [[] for _ in range(training.mini_batches)]
        for place, group in sorted(groups_by_place.items()):
            samples[place // per_mini_batch] += _samples(group, place * len(group.responses), version)
        return cls(
            groups=tuple(_without_routes(group) for group in (*groups_by_place.values(), *dropped)),
            samples=rebalance(samples, lambda sample: is_learned_from(sample, recipe)),
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


def plan_mini_batches(experience: Experience, recipe: Recipe, pad_token_id: int) -> list[MiniBatch]:
    """Pack every mini-batch's responses into micro-batches: the step's plan, which each of its passes uses.

    Responses that teach nothing (`is_learned_from`) are left out of it, and out of no denominator.
    """
    planned = []
    for samples in experience.samples:
        learned_from = [sample for sample in samples if is_learned_from(sample, recipe)]
        num_tokens = sum(sample.num_sampled_tokens for sample in samples)
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
    if must_pass or not recipe.training.skip_zero_advantages:
        return True
    return sample.advantage != 0 or (sample.token_advantages is not None and bool(sample.token_advantages.any()))


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


def _samples(group: Group, first_index: int, version: int) -> list[Sample]:
    of_tokens = group.token_advantages or (None,) * len(group.responses)
    return [
        Sample(
            index=first_index + offset,
            prompt_token_ids=np.asarray(group.prompt.token_ids, dtype=np.int64),
            response_token_ids=response.token_ids,
            advantage=float(advantage),
            behaviour_log_probs=response.log_probs,
            routed_experts=response.routed_experts,
            staleness=version - response.token_versions,
            is_sampled=response.is_sampled,
            token_advantages=of_tokens[offset],
        )
        for offset, (response, advantage) in enumerate(zip(group.responses, group.advantages, strict=True))
    ]


def _without_routes(group: Group) -> Group:
    """The group as rewards and lengths are measured from it: routes are large, and travel once."""
    return replace(group, responses=tuple(replace(response, routed_experts=None) for response in group.responses))
