"""What a step learns from, collected through the real local engine: no prompt is lost, and none counts twice."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_gspo.training.ahead import SamplingAhead
from megatron_gspo.training.assembly import Run, assemble
from megatron_gspo.training.collector import (
    ExperienceCollector,
    ScoredPrompt,
    choose_groups,
    num_carried,
    scored_group,
)
from megatron_gspo.training.experience import Experience
from megatron_gspo.types import OpenGroup, Prompt, Response, SamplingSettings
from tests.unit.training.test_step import make_recipe

pytestmark = pytest.mark.usefixtures("_one_rank")

G, PROMPTS_PER_STEP = 2, 4


@pytest.fixture
def make_run(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def make(**rollout: object) -> Run:
        recipe = make_recipe(
            tmp_path / str(len(runs)),
            rollout={"responses_per_prompt": G, "max_response_tokens": 16} | rollout,
            reward={"name": "tests.end_to_end.length_reward:even_length"},
        )
        # A policy of random weights stops about once in eight tokens: responses of all lengths.
        (recipe.model.path / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(34))}))
        runs.append(assemble(recipe))
        return runs[-1]

    yield make
    for run in runs:
        run.close()


def with_other_weights(run: Run) -> None:
    """The policy's next version, in the engine too."""
    with torch.no_grad():
        for model in run.policy.models:
            for parameter in model.parameters():
                parameter.mul_(0.98)
    run.policy.version += 1
    run.hand_over_weights()


def collect(run: Run, num_steps: int) -> list[Experience]:
    collected = []
    for step in range(1, num_steps + 1):
        collected.append(run.collector.collect(step, run.policy.version))
        with_other_weights(run)
    return collected


def positions(experience: Experience) -> list[int]:
    return [group.prompt.position for group in experience.groups]


def staleness(experience: Experience) -> np.ndarray:
    return np.concatenate([sample.staleness for samples in experience.samples for sample in samples])


def test_a_step_that_waits_for_all_takes_the_prompts_in_their_order(make_run: Callable[..., Run]):
    for step, experience in enumerate(collect(make_run(), 2)):
        assert positions(experience) == list(range(step * PROMPTS_PER_STEP, (step + 1) * PROMPTS_PER_STEP))
        indices = [[sample.index for sample in samples] for samples in experience.samples]
        assert indices == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert not staleness(experience).any()


def test_carried_groups_are_finished_by_later_weights_and_counted_once(make_run: Callable[..., Run]):
    run = make_run(close_at_fraction=0.4)
    assert num_carried(run.recipe) == 6
    steps = collect(run, 5)
    done = [position for experience in steps for position in positions(experience)]
    assert len(set(done)) == len(done) == 5 * PROMPTS_PER_STEP
    state = run.prompts.state()
    assert sorted([*done, *state["unfinished"]]) == list(range(state["cursor"]))
    assert len(state["unfinished"]) == 6
    for version, experience in enumerate(steps):
        responses = [response for group in experience.groups for response in group.responses]
        assert len(responses) == G * PROMPTS_PER_STEP
        assert all(response.finish_reason in ("stop", "length") for response in responses)
        oldest = min(response.token_versions.min() for response in responses)
        assert staleness(experience).max() == version - oldest
        by_index = {sample.index: sample for samples in experience.samples for sample in samples}
        for index, response in enumerate(responses):
            assert by_index[index].staleness.tolist() == (version - response.token_versions).tolist()
    assert any(len(r.version_spans) > 1 for e in steps for group in e.groups for r in group.responses)
    assert max(staleness(experience).max() for experience in steps) > 1


def test_what_is_too_stale_is_sampled_anew_and_counted(make_run: Callable[..., Run]):
    steps = collect(make_run(close_at_fraction=0.4, max_staleness=1), 5)
    assert max(staleness(experience).max() for experience in steps) == 1
    assert sum(experience.engine_counts["rollout/num_too_stale"] for experience in steps) > 0


def test_groups_of_equal_rewards_make_way_for_others(make_run: Callable[..., Run]):
    run = make_run(dynamic_sampling_rounds=3)
    for experience in collect(run, 2):
        teaches = {group.prompt.position: group.teaches for group in experience.groups}
        num_learned_from = sum(len(samples) for samples in experience.samples) // G
        assert num_learned_from == PROMPTS_PER_STEP
        num_dropped = experience.engine_counts["groups/num_dropped"]
        assert num_dropped == len(teaches) - PROMPTS_PER_STEP > 0
        learned_from = [s for samples in experience.samples for s in samples]
        num_worthless = sum(
            not any(s.advantage for s in learned_from[i : i + G]) for i in range(0, len(learned_from), G)
        )
        assert num_worthless == max(0, PROMPTS_PER_STEP - sum(teaches.values())), "only where the rounds were used up"
        assert num_worthless == 0 or experience.engine_counts["groups/num_rounds"] == 4
    assert run.prompts.state()["unfinished"] == []


def test_steps_that_sample_ahead_lose_no_prompt_and_stay_within_the_bound(make_run: Callable[..., Run]):
    run = make_run(close_at_fraction=0.5)
    # The recipe's check refuses this for the local engine, which has no time of its own; what is counted is the same.
    rollout = run.recipe.rollout.model_copy(update={"one_step_ahead": True})
    training = run.recipe.training.model_copy(update={"steps": 4})
    recipe = run.recipe.model_copy(update={"rollout": rollout, "training": training})
    run.collector = ExperienceCollector(recipe, run.prompts, run.rollouts, run.tokenizer)
    done: list[int] = []
    for step in range(1, 5):
        experience = run.collector.collect(step, run.policy.version)
        run.collector.sample_ahead(step + 1, run.policy.version + 1)
        with_other_weights(run)  # pauses what is sampled
        run.collector.go_on()
        done += positions(experience)
        state = run.prompts.state()
        assert sorted([*done, *state["unfinished"]]) == list(range(state["cursor"]))
        assert staleness(experience).min() >= 0
        assert staleness(experience).max() <= recipe.rollout.max_staleness
    assert len(done) == len(set(done)) == 4 * PROMPTS_PER_STEP


def test_what_sampling_ahead_raises_is_raised_where_it_is_taken(make_run: Callable[..., Run]):
    run = make_run()
    ahead = SamplingAhead(run.rollouts.engine)
    run.rollouts.engine.close()
    ahead.start([OpenGroup.of(Prompt("p", (1,), "", ""), G)], 1, SamplingSettings(max_response_tokens=4))
    with pytest.raises(RuntimeError, match="has no weights"):
        ahead.take()
    ahead.close()


@pytest.mark.parametrize(
    ("drop_equal", "num_wanted", "chosen"),
    [(False, 3, [0, 2, 5]), (True, 3, [2, 7, 9]), (True, 4, [0, 2, 7, 9]), (True, 9, [0, 2, 5, 7, 9])],
)
def test_the_earliest_groups_that_teach_are_chosen_first(drop_equal: bool, num_wanted: int, chosen: list[int]):
    scored = [ScoredPrompt(*entry) for entry in [(7, True), (5, False), (9, True), (2, True), (0, False)]]
    assert choose_groups(scored, num_wanted, drop_equal=drop_equal) == chosen


def test_long_responses_lose_before_advantages_are_taken_and_rewards_stay_as_they_were(tmp_path: Path):
    recipe = make_recipe(tmp_path, reward={"overlong_buffer_tokens": 4})  # of 12 tokens
    responses = tuple(
        Response("p", np.zeros(length, np.int64), np.zeros(length, np.float32), "stop", 0) for length in (8, 10, 12)
    )
    group = scored_group(Prompt("p", (1,), "", ""), responses, np.ones(3, np.float32), recipe)
    assert group.rewards.tolist() == [1, 1, 1]
    assert group.penalties.tolist() == [0, -0.5, -1]
    np.testing.assert_allclose(group.advantages, [1.5**0.5, 0, -(1.5**0.5)], atol=1e-6)
    assert group.teaches
