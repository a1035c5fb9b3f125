"""Weights by disk and by broadcast, to two real servers: exact, and never mixed up whatever happens to one of them.

The last test leaves a server that is still coming up again.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from megatron_gspo.config import Recipe
from megatron_gspo.rollout.sglang import ServerHost, SglangEngine
from megatron_gspo.rollout.sglang_http import SglangHttp, weight_label
from megatron_gspo.rollout.weight_sync_servers import INCOMPLETE
from megatron_gspo.types import Prompt, Response, TrainingFailedError
from tests.rollout.real_server import (
    PROMPTS,
    SETTINGS,
    both_are_up,
    by_transformers,
    engine_by,
    policy,
    wait_until,
    weights_of,
)

SEQUENCE = list(range(20, 52))


def log_probs_of(model: PreTrainedModel) -> torch.Tensor:
    """What the policy gives the tokens of `SEQUENCE` but the first, at temperature 1."""
    response = Response("sequence", np.array(SEQUENCE[1:]), np.zeros(31, dtype=np.float32), "length", 0)
    prompt = Prompt(id="sequence", token_ids=tuple(SEQUENCE[:1]), text="", answer="")
    return torch.from_numpy(by_transformers(model, prompt, response, 1.0)[0])


def sampled_by(model: PreTrainedModel, engine: SglangEngine) -> bool:
    """Whether `model` gives every token that the engine samples now the log-prob it comes with."""
    groups = engine.generate(PROMPTS, 3, SETTINGS)
    return all(
        np.abs(by_transformers(model, prompt, response, SETTINGS.temperature)[0] - response.log_probs).max() < 1e-4
        for prompt, group in zip(PROMPTS, groups, strict=True)
        for response in group
    )


def in_use(engine: SglangEngine) -> list[bool]:
    return [not endpoint.is_out for endpoint in engine._client.endpoints]


def halfway(
    weights: Iterator[tuple[str, torch.Tensor]], host: ServerHost, server: int, sent: signal.Signals
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights, with a signal to a server's processes once it holds some of them and not the others."""
    everything, http = list(weights), SglangHttp(host.connection.key, 30.0)
    process, url = host.servers.process_ids()[server], host.connection.urls[server]
    for position, named in enumerate(everything):
        if position == len(everything) // 2:
            wait_until(lambda: str(http.run(weight_label(http, url))).endswith(INCOMPLETE), "the server has begun")
            os.killpg(process, sent)
        yield named


@pytest.fixture
def both_up(host: ServerHost) -> None:
    """Both servers answer, also after a test that killed one."""
    wait_until(lambda: both_are_up(host), "both servers are up")


@pytest.mark.parametrize("transport", ["disk", "broadcast"])
@pytest.mark.usefixtures("both_up")
def test_every_server_gets_every_version(transport: str, recipe: Recipe, host: ServerHost):
    first, second = policy(recipe, seed=1), policy(recipe, seed=2)
    with engine_by(transport, recipe, host) as engine:
        engine.take_counts()
        engine.update_weights(weights_of(first), version=1)
        engine.verify_weights(SEQUENCE, log_probs_of(first), 1e-4)
        engine.update_weights(weights_of(second), version=2)
        engine.verify_weights(SEQUENCE, log_probs_of(second), 1e-4)
        with pytest.raises(TrainingFailedError, match="differ"):
            engine.verify_weights(SEQUENCE, log_probs_of(first), 1e-4)
        assert sampled_by(second, engine)
        assert in_use(engine) == [True, True]
        assert not any(engine.take_counts().values())


@pytest.mark.usefixtures("both_up")
def test_weights_that_a_server_cannot_take_from_a_broadcast_stop_the_run(recipe: Recipe, host: ServerHost):
    with engine_by("broadcast", recipe, host) as engine:
        with pytest.raises(TrainingFailedError, match="update_weights_from_distributed answered 400"):
            engine.update_weights(iter([("model.norm.weight", torch.zeros(3))]), version=1)
        with pytest.raises(RuntimeError, match="no weights"):
            engine.generate(PROMPTS, 1, SETTINGS)
        labels = [engine._http.run(weight_label(engine._http, url)) for url in host.connection.urls]
        assert engine._sync.label(1) not in labels


@pytest.mark.parametrize("transport", ["disk", "broadcast"])
@pytest.mark.usefixtures("both_up")
def test_memory_is_released_between_the_last_response_and_the_next_weights(
    transport: str, recipe: Recipe, host: ServerHost, monkeypatch: pytest.MonkeyPatch
):
    asked: list[tuple[str, object]] = []
    request = SglangHttp._request

    async def noted(
        self: SglangHttp, url: str, endpoint: str, body: dict[str, object] | None, timeout_s: float | None
    ) -> httpx.Response:
        if url == host.connection.urls[0] and body is not None and endpoint != "/generate":
            asked.append((endpoint.partition("?")[0], body.get("tags")))
        return await request(self, url, endpoint, body, timeout_s)

    with engine_by(transport, recipe, host, release_memory=True) as engine:
        engine.update_weights(weights_of(policy(recipe, seed=1)), version=1)
        monkeypatch.setattr(SglangHttp, "_request", noted)
        engine.release_memory()
        with pytest.raises(RuntimeError, match="no weights"):
            engine.generate(PROMPTS, 1, SETTINGS)
        model = policy(recipe, seed=2)
        engine.update_weights(weights_of(model), version=2)
        assert asked[:3] == [
            ("/flush_cache", None),
            ("/update_weight_version", None),
            ("/release_memory_occupation", ["kv_cache", "weights"]),
        ]
        assert asked[3] == ("/resume_memory_occupation", ["weights"])
        assert asked[-1] == ("/resume_memory_occupation", ["kv_cache"])
        sending = {"disk": "/update_weights_from_disk", "broadcast": "/update_weights_from_distributed"}[transport]
        assert sending in [endpoint for endpoint, _ in asked[4:-1]]
        assert sampled_by(model, engine)


@pytest.mark.usefixtures("both_up")
def test_a_server_killed_while_it_loads_a_file_leaves_the_step_to_the_other(recipe: Recipe, host: ServerHost):
    model, victim = policy(recipe, seed=2), host.servers.process_ids()[1]
    with engine_by("disk", recipe, host) as engine:
        engine.update_weights(weights_of(policy(recipe, seed=1)), version=1)
        os.killpg(victim, signal.SIGSTOP)  # it takes the request, and dies over it
        threading.Timer(1.0, os.killpg, (victim, signal.SIGKILL)).start()
        engine.update_weights(weights_of(model), version=2)
        assert in_use(engine) == [True, False]
        assert sampled_by(model, engine)


@pytest.mark.usefixtures("both_up")
def test_a_server_killed_in_the_middle_of_a_broadcast_comes_back_with_the_right_weights(
    recipe: Recipe, host: ServerHost
):
    model, returned, restarted = policy(recipe, seed=2), 0, 0
    with engine_by("broadcast", recipe, host) as engine:
        engine.update_weights(weights_of(policy(recipe, seed=1)), version=1)
        engine.take_counts()
        engine.update_weights(halfway(weights_of(model), host, 1, signal.SIGKILL), version=2)
        assert in_use(engine) == [True, False]
        assert sampled_by(model, engine)

        def is_back() -> bool:  # while nothing is sampled, as during an update
            nonlocal returned, restarted
            counts = engine.take_counts()
            returned += int(counts["rollout/num_resyncs"])
            restarted += int(counts["rollout/num_restarts"])
            return returned == 1

        wait_until(is_back, "the server is brought up to date")
        assert restarted == 1
        engine._client.endpoints[0].is_out = True  # leaves the one that came back
        engine._client.endpoints[1].is_out = False
        assert sampled_by(model, engine)
        engine.update_weights(weights_of(policy(recipe, seed=1)), version=3)
        assert in_use(engine) == [True, True]
        engine.verify_weights(SEQUENCE, log_probs_of(policy(recipe, seed=1)), 1e-4)


@pytest.mark.usefixtures("both_up")
def test_a_server_that_takes_nothing_is_ended_and_the_other_goes_on(recipe: Recipe, host: ServerHost):
    model, victim = policy(recipe, seed=2), host.servers.process_ids()[0]
    with engine_by("broadcast", recipe, host, weight_timeout_s=10.0) as engine:
        engine.update_weights(weights_of(policy(recipe, seed=1)), version=1)
        engine.update_weights(halfway(weights_of(model), host, 0, signal.SIGSTOP), version=2)
        assert in_use(engine) == [False, True]
        assert sampled_by(model, engine)
        wait_until(lambda: victim not in host.servers.process_ids(), "the server is ended")
