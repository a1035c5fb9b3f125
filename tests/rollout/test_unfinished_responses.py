"""Responses that outlive the weights which began them, on a real SGLang server: nothing of them changes or is lost."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_gspo.config import Recipe
from megatron_gspo.rollout import sglang_client
from megatron_gspo.rollout.sglang import ServerHost, SglangEngine
from megatron_gspo.training.ahead import SamplingAhead
from megatron_gspo.types import OpenGroup, Prompt, Response, VersionSpan
from tests.end_to_end.program import Program
from tests.rollout.real_server import (
    PROMPTS,
    SETTINGS,
    by_transformers,
    engine_on,
    faulty_proxy,
    policy,
    servers_of,
    weights_of,
)

G = 4
# Responses of ten to hundreds of tokens, and so many that a busy client hears of the first group long before the last ends.
LONG = replace(SETTINGS, max_response_tokens=400, stop_token_ids=(1, 2, 3, 4, 5))
TWICE = [replace(prompt, id=f"{prompt.id}:{turn}") for turn in range(2) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def policies(recipe: Recipe) -> dict[int, torch.nn.Module]:
    """By the version that each is given to the engine as."""
    return {version: policy(recipe, seed=version) for version in (1, 2)}


@pytest.fixture
def engine(recipe: Recipe, host: ServerHost, policies: dict[int, torch.nn.Module]) -> SglangEngine:
    engine = engine_on(recipe, host)
    engine.update_weights(weights_of(policies[1]), version=1)
    return engine


def begun(groups: Sequence[OpenGroup]) -> list[tuple[Prompt, Response]]:
    return [(group.prompt, response) for group in groups for response in group.responses if response is not None]


def assert_each_token_is_its_versions(policies: dict[int, torch.nn.Module], prompt: Prompt, response: Response) -> None:
    """Log-probs and routes of every span are those of the version that is said to have sampled it."""
    assert response.version_spans[0].start == 0
    first_route = 0
    for span in response.version_spans:
        log_probs, routes = by_transformers(policies[span.version], prompt, response, LONG.temperature)
        tokens = slice(span.start, span.end)
        np.testing.assert_allclose(response.log_probs[tokens], log_probs[tokens], atol=1e-4)
        last_route = len(prompt.token_ids) + span.end - 1  # what the span's last token was sampled from lies before it
        np.testing.assert_array_equal(
            np.sort(response.routed_experts[first_route:last_route]), np.sort(routes[first_route:last_route])
        )
        first_route = last_route
    assert first_route == len(response.routed_experts)


def test_a_step_that_closes_early_loses_nothing_and_new_weights_finish_what_was_begun(
    engine: SglangEngine, policies: dict[int, torch.nn.Module]
):
    groups = [OpenGroup.of(prompt, G) for prompt in TWICE]
    closed = engine.generate_until(groups, 1, LONG)
    assert [group.prompt for group in closed] == TWICE
    assert any(group.is_complete for group in closed)
    unfinished = [response for _, response in begun(closed) if response.finish_reason == "abort"]
    assert unfinished, "the others were called off"
    for prompt, response in begun(closed):
        assert response.version_spans == (VersionSpan(1, 0, len(response.token_ids)),)
        assert_each_token_is_its_versions(policies, prompt, response)

    engine.update_weights(weights_of(policies[2]), version=2)
    finished = engine.generate_until(closed, len(closed), LONG)
    assert all(group.is_complete for group in finished)
    num_mixed = 0
    for before, after in zip(closed, finished, strict=True):
        for old, new in zip(before.responses, after.responses, strict=True):
            assert new.token_ids[-1] in LONG.stop_token_ids or len(new.token_ids) == LONG.max_response_tokens
            assert not np.isin(new.token_ids[:-1], LONG.stop_token_ids).any()
            assert_each_token_is_its_versions(policies, after.prompt, new)
            if old is None:
                assert new.version_spans == (VersionSpan(2, 0, len(new.token_ids)),)
                continue
            length = len(old.token_ids)
            assert new.token_ids[:length].tolist() == old.token_ids.tolist()
            assert new.log_probs[:length].tolist() == old.log_probs.tolist()
            if old.finish_reason == "abort":
                assert new.version_spans == (VersionSpan(1, 0, length), VersionSpan(2, length, len(new.token_ids)))
                num_mixed += 1
            else:
                assert new is old
    assert num_mixed == len(unfinished)
    counts = engine.take_counts()
    assert counts["rollout/num_retries"] == counts["rollout/num_stale_responses"] == 0


def test_weights_change_while_responses_are_sampled_in_a_thread(
    engine: SglangEngine, policies: dict[int, torch.nn.Module]
):
    ahead = SamplingAhead(engine)
    endless = replace(LONG, max_response_tokens=120, stop_token_ids=())
    ahead.start([OpenGroup.of(prompt, G) for prompt in PROMPTS], len(PROMPTS), endless)
    paused: list[OpenGroup] = []
    while not begun(paused):  # however long a busy server takes to its first token
        ahead.go_on()
        time.sleep(0.5)
        ahead.pause()
        paused = ahead._paused
    tokens_then = [len(response.token_ids) for _, response in begun(paused)]
    engine.update_weights(weights_of(policies[2]), version=2)
    ahead.go_on()
    taken = begun(ahead.take())
    ahead.close()
    assert len(taken) == G * len(PROMPTS)
    assert all(len(response.token_ids) == endless.max_response_tokens for _, response in taken)
    if max(tokens_then) < endless.max_response_tokens:
        assert any(len(response.version_spans) == 2 for _, response in taken)
    for prompt, response in taken:
        assert_each_token_is_its_versions(policies, prompt, response)
    assert engine.take_counts()["rollout/num_stale_responses"] == 0


def test_a_server_that_hangs_does_not_hold_up_a_step_that_closes(
    recipe: Recipe, host: ServerHost, policies: dict[int, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sglang_client, "LONGEST_CALL_OFF_S", 1.0)
    groups = [OpenGroup.of(prompt, G) for prompt in PROMPTS]
    with faulty_proxy(host.connection.urls[0], ["hang"]) as hanging:
        engine = engine_on(recipe, host, hanging, host.connection.urls[0])
        engine.update_weights(weights_of(policies[1]), version=1)
        closed = engine.generate_until(groups, len(groups) - 1, SETTINGS)
        assert sum(response is None for group in closed for response in group.responses) == 1
        finished = begun(engine.generate_until(closed, len(groups), SETTINGS))
    assert len(finished) == G * len(PROMPTS)
    for prompt, response in finished:
        assert_each_token_is_its_versions(policies, prompt, response)


def test_two_ranks_train_one_step_behind_with_groups_carried(
    recipe_file: Path, host: ServerHost, program: Program, tmp_path: Path
):
    options = ["rollout.one_step_ahead=true", "rollout.close_at_fraction=0.5", "rollout.old_log_probs=engine"]
    options += ["parallel.data=2", "training.steps=3", "evaluation.every=1"]
    done = program.run("train", recipe_file, *servers_of(host), *options, "--output-dir", tmp_path / "run", num_ranks=2)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["policy_version"] for line in lines] == [0, 1, 2, 3]
    assert lines[1]["rollout/staleness_max"] == 0, "the first step has nothing to be ahead of"
    assert 1 <= max(line["rollout/staleness_max"] for line in lines[2:]) <= 2
    for line in lines[1:]:
        assert line["rollout/num_carried"] == 4
        assert line["rollout/num_stale_responses"] == line["rollout/num_retries"] == 0
        assert line["routing/replayed_token_fraction"] == 1.0
        assert line.get("mismatch/log_prob_abs_mean", 0.0) < 1e-4, "of responses sampled by the same weights"
        assert line.get("routing/engine_disagreement", 0.0) == 0.0
    saved = json.loads((tmp_path / "run" / "checkpoints" / "step_3" / "state.json").read_text())["prompts"]
    # Three steps of 4 prompts are done with; 4 are carried.
    assert saved["cursor"] == 16
    assert len(saved["unfinished"]) == 4
