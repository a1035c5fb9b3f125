"""A step's experience: prompts drawn, sampled and scored until the step has the groups it learns from.

In: the stream of prompts; a data leader's rollout engine and reward. Out: the step's `Experience`.

Prompts are drawn in rounds. Each is sampled by one data-parallel rank: of a round's prompts, rank r of d takes every d-th
from its own on. Where steps close early (`rollout.close_at_fraction`), a rank samples more groups at one time than it owes
the step; what is not complete when it has those is carried, and comes first in the next round. Under dynamic sampling
(DAPO, arXiv 2503.14476, §3.2; `rollout.dynamic_sampling_rounds`) groups whose rewards are all equal are dropped, and a
further round draws as many as are missing. Where the rounds are used up, dropped groups fill the step's last places:
their advantages are 0. Places in the step go to groups in the order their prompts were drawn in.

Every rank draws the same prompts, so that cursors agree. A prompt is unfinished from then until its group is learned from
or dropped; unfinished prompts are saved with the cursor, and a run that goes on from there draws them again, and first.
What was sampled of their responses is not saved.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_gspo import parallel
from megatron_gspo.config import Recipe
from megatron_gspo.data.prompts import PromptStream
from megatron_gspo.policy_loss import group_advantages, resolve_objective, token_advantages
from megatron_gspo.reward import overlong_penalties
from megatron_gspo.training.agreement import unless_an_engine_is_gone
from megatron_gspo.training.ahead import SamplingAhead
from megatron_gspo.training.experience import Experience
from megatron_gspo.training.rollouts import Rollouts, training_settings
from megatron_gspo.training.staleness import without_too_stale
from megatron_gspo.types import Group, OpenGroup, Prompt, Response, SamplingSettings


class ScoredPrompt(NamedTuple):
    """What all ranks need to know of a group that one of them scored."""

    position: int  # `Prompt.position`
    teaches: bool  # `Group.teaches`


def choose_groups(scored: Sequence[ScoredPrompt], num_wanted: int, *, drop_equal: bool) -> list[int]:
    """The positions of the groups to learn from, ascending: `num_wanted` of them, or all where there are fewer.

    The earliest are chosen; where `drop_equal`, those that teach nothing only where the others are too few.
    """
    by_worth = sorted(scored, key=lambda group: (drop_equal and not group.teaches, group.position))
    return sorted(group.position for group in by_worth[:num_wanted])


def num_carried(recipe: Recipe) -> int:
    """Groups that each data-parallel rank carries from step to step: what it samples at one time beyond its share."""
    share = recipe.training.prompts_per_step // recipe.parallel.data
    return ceil(share / recipe.rollout.close_at_fraction) - share


#: A prompt and its G responses, all at their end, by `Prompt.position`.
_Complete = dict[int, tuple[Prompt, tuple[Response, ...]]]


class _Round(NamedTuple):
    """What a rank's engine is asked for."""

    groups: list[OpenGroup]  # the longest carried first
    num_owed: int  # how many of them are to be completed
    settings: SamplingSettings


@dataclass
class _StepGroups:
    """A step's groups so far, and what getting them took."""

    own: dict[int, Group] = field(default_factory=dict)  # what this rank scored, by `Prompt.position`
    of_all_ranks: list[ScoredPrompt] = field(default_factory=list)
    num_failed_rewards: int = 0
    rollout_s: float = 0.0  # waited for responses
    reward_s: float = 0.0


class ExperienceCollector:
    """Collects the experience of one step after the other. Every rank has one and makes the same calls."""

    def __init__(
        self, recipe: Recipe, prompts: PromptStream, rollouts: Rollouts | None, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """`rollouts`: on data leaders."""
        self._recipe, self._prompts, self._rollouts, self._tokenizer = recipe, prompts, rollouts, tokenizer
        self._carried: list[OpenGroup] = []  # by this rank
        self._carries = False  # whether what is carried from step to step was drawn already
        self._unfinished: set[int] = set()  # positions, of all ranks
        self._counts: Counter[str] = Counter()
        self._begun: _Round | None = None  # the next step's first round, which is sampled ahead
        is_ahead = recipe.rollout.one_step_ahead
        self._ahead = SamplingAhead(rollouts.engine) if rollouts is not None and is_ahead else None

    def collect(self, step: int, version: int) -> Experience:
        """What the policy of `version` learns from in step `step`.

        Raises:
            OutageError: a data leader's engine is gone; on every rank.
        """
        wanted, num_rounds = self._recipe.training.prompts_per_step, self._recipe.rollout.dynamic_sampling_rounds
        groups, num_missing = _StepGroups(), wanted
        for number in range(1 + num_rounds):
            begun, self._begun = self._begun, None
            asked = begun or self._draw(num_missing, step, number, version)
            self._sample_and_score(asked, groups, is_begun=begun is not None)
            groups.of_all_ranks = parallel.broadcast_from_data_leader(groups.of_all_ranks)
            self._unfinished -= {group.position for group in groups.of_all_ranks}
            num_missing = wanted - sum(group.teaches or num_rounds == 0 for group in groups.of_all_ranks)
            self._counts["groups/num_rounds"] += parallel.data_rank() == 0
            if num_missing == 0:
                break
        self._prompts.unfinished = tuple(sorted(self._unfinished))
        experience = None if self._rollouts is None else self._experience(groups, version, self._rollouts)
        return parallel.broadcast_from_data_leader(experience)

    def sample_ahead(self, step: int, version: int) -> None:
        """Begin to sample what the policy of `version` will learn from in step `step`, where the recipe asks for it."""
        if not self._recipe.rollout.one_step_ahead or step > self._recipe.training.steps:
            return
        self._begun = self._draw(self._recipe.training.prompts_per_step, step, 0, version)
        if self._ahead is not None:
            self._ahead.start(*self._begun)

    def pause(self) -> None:
        """Stop sampling ahead until `go_on`, so that engines can be given weights or asked for other things.

        No engine of any rank samples when this returns. An engine that is gone by then is told of by `collect`.
        """
        if not self._recipe.rollout.one_step_ahead:
            return
        if self._ahead is not None:
            self._ahead.pause()
        parallel.gather_objects(None)

    def go_on(self) -> None:
        """Go on with what `pause` stopped, with the weights that engines have now."""
        if self._ahead is not None:
            self._ahead.go_on()

    def close(self) -> None:
        """Give up what is being sampled."""
        if self._ahead is not None:
            self._ahead.close()

    def _draw(self, num_missing: int, step: int, round_number: int, version: int) -> _Round:
        """Draw a round's prompts, on all ranks alike: what this one is to sample of them, and of what it carries."""
        rank, num_ranks, rollout = parallel.data_rank(), parallel.data_size(), self._recipe.rollout
        num_drawn = num_missing + (0 if self._carries else num_ranks * num_carried(self._recipe))
        self._carries = True
        prompts = self._prompts.next_prompts(num_drawn)
        self._unfinished |= {prompt.position for prompt in prompts}
        self._prompts.unfinished = tuple(sorted(self._unfinished))
        carried, num_too_stale = without_too_stale(self._carried, version, rollout.max_staleness)
        self._counts["rollout/num_too_stale"] += num_too_stale
        own = [OpenGroup.of(prompt, rollout.responses_per_prompt) for prompt in prompts[rank::num_ranks]]
        settings = training_settings(self._recipe, self._tokenizer, step, round_number)
        return _Round([*carried, *own], len(range(rank, num_missing, num_ranks)), settings)

    def _sample_and_score(self, asked: _Round, groups: _StepGroups, *, is_begun: bool) -> None:
        """Complete this rank's share of a round, and tell the other data leaders what it is worth."""
        rollouts, started = self._rollouts, time.perf_counter()
        complete = unless_an_engine_is_gone(
            lambda: {} if rollouts is None else self._sample(asked, rollouts, is_begun=is_begun)
        )
        if rollouts is None:
            return
        rolled_out = time.perf_counter()
        own = self._score(complete, rollouts, groups)
        groups.rollout_s += rolled_out - started
        groups.reward_s += time.perf_counter() - rolled_out
        told = parallel.gather_over_data_ranks([ScoredPrompt(group.prompt.position, group.teaches) for group in own])
        groups.of_all_ranks += [scored for rank in told for scored in rank]

    def _sample(self, asked: _Round, rollouts: Rollouts, *, is_begun: bool) -> _Complete:
        """The groups that are owed, complete; the others are carried."""
        if is_begun:
            assert self._ahead is not None, "what has begun was begun ahead"
            sampled = self._ahead.take()
        elif num_carried(self._recipe) == 0:  # no response is left unfinished, of one turn or several
            prompts, group_size = [group.prompt for group in asked.groups], self._recipe.rollout.responses_per_prompt
            whole = rollouts.generate(prompts, group_size, asked.settings)
            return {prompt.position: (prompt, group) for prompt, group in zip(prompts, whole, strict=True)}
        else:
            sampled = rollouts.engine.generate_until(*asked)
        complete = {
            group.prompt.position: (group.prompt, group.begun)
            for group in [group for group in sampled if group.is_complete][: asked.num_owed]
        }
        self._carried = [group for group in sampled if group.prompt.position not in complete]
        return complete

    def _score(self, complete: _Complete, rollouts: Rollouts, groups: _StepGroups) -> list[Group]:
        prompts, responses = [prompt for prompt, _ in complete.values()], [group for _, group in complete.values()]
        scored = rollouts.score(prompts, responses)
        groups.num_failed_rewards += scored.num_failed_rewards
        own = [
            scored_group(prompt, sampled, rewards, self._recipe)
            for prompt, sampled, rewards in zip(prompts, responses, scored.rewards, strict=True)
        ]
        groups.own |= {group.prompt.position: group for group in own}
        return own

    def _experience(self, groups: _StepGroups, version: int, rollouts: Rollouts) -> Experience:
        """The step's groups, each in its place. A collective among data leaders."""
        rollout = self._recipe.rollout
        drop_equal = rollout.dynamic_sampling_rounds > 0
        chosen = choose_groups(groups.of_all_ranks, self._recipe.training.prompts_per_step, drop_equal=drop_equal)
        place_of = {position: place for place, position in enumerate(chosen)}
        by_place = {place_of[position]: group for position, group in groups.own.items() if position in place_of}
        dropped = [group for position, group in groups.own.items() if position not in place_of]
        counts = rollouts.take_counts()
        if drop_equal:
            counts["groups/num_rounds"] = self._counts["groups/num_rounds"]
            counts["groups/num_dropped"] = len(dropped)
        if rollout.close_at_fraction < 1:
            counts["rollout/num_carried"] = len(self._carried)
            counts["rollout/num_too_stale"] = self._counts["rollout/num_too_stale"]
        self._counts.clear()
        return Experience.of(
            by_place,
            self._recipe,
            version=version,
            num_failed_rewards=groups.num_failed_rewards,
            rollout_s=groups.rollout_s,
            reward_s=groups.reward_s,
            dropped=dropped,
            engine_counts=counts,
        )


def scored_group(prompt: Prompt, responses: tuple[Response, ...], rewards: np.ndarray, recipe: Recipe) -> Group:
    """The group, with its advantages (eq. 7) and, where the recipe asks for it, what long responses lose.

    Where an environment gave rewards on the way and the objective takes them, tokens have advantages of their own (eq. 14).

    Args:
        prompt: what the responses answer.
        responses: G of them.
        rewards: [G] float32.
        recipe: its `reward` and `objective` sections.
    """
    penalties, buffer = None, recipe.reward.overlong_buffer_tokens
    if buffer > 0:
        lengths = [response.num_sampled_tokens for response in responses]
        penalties = overlong_penalties(lengths, max_tokens=recipe.max_sampled_tokens, buffer_tokens=buffer)
    shaped = rewards if penalties is None else rewards + penalties
    normalization = recipe.objective.advantage_normalization
    of_tokens = None
    on_the_way = [response.token_rewards for response in responses if response.token_rewards is not None]
    if any(own.any() for own in on_the_way) and resolve_objective(recipe.objective.name).takes_token_advantages:
        of_tokens = tuple(token_advantages(shaped, on_the_way, normalization))
    return Group(prompt, responses, rewards, group_advantages(shaped, normalization), penalties, of_tokens)
