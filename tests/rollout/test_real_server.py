"""Rollouts from a real SGLang server: exact, current, and whole whatever goes wrong on the way."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from megatron_gspo.config import Recipe
from megatron_gspo.data.tokenizer import build_byte_tokenizer
from megatron_gspo.rollout.multi_turn import MultiTurn
from megatron_gspo.rollout.sglang import ServerHost, SglangEngine
from megatron_gspo.rollout.sglang_client import ServersGoneError
from megatron_gspo.rollout.sglang_http import SglangHttp
from megatron_gspo.rollout.sglang_response import ResponseSchemaError
from megatron_gspo.rollout.weight_sync_disk import DiskWeightSync
from megatron_gspo.types import Prompt, Response, TrainingFailedError
from tests.end_to_end.program import Program
from tests.rollout.conftest import LOOK_EVERY_S
from tests.rollout.real_server import (
    PROMPTS,
    SETTINGS,
    both_are_up,
    by_transformers,
    engine_on,
    faulty_proxy,
    policy,
    servers_of,
    wait_until,
    wait_until_gone,
    weights_of,
    with_sglang,
)
from tests.unit.rollout.talkative import Talkative

ROOT = Path(__file__).parents[2]
G = 3


@pytest.fixture(scope="module")
def engine(recipe: Recipe, host: ServerHost) -> SglangEngine:
    return engine_on(recipe, host)


def sampled_by(model: torch.nn.Module, groups: list[tuple[Response, ...]], prompts: list[Prompt] = PROMPTS) -> bool:
    """Whether `model` gives every sampled token the log-prob it came with; prints the first response where it does not."""
    for prompt, group in zip(prompts, groups, strict=True):
        for response in group:
            log_probs, routes = by_transformers(model, prompt, response, SETTINGS.temperature)
            differences = np.abs(log_probs - response.log_probs)
            if differences.max() >= 1e-4:
                rerouted = (np.sort(routes) != np.sort(response.routed_experts)).any(axis=(1, 2))
                print(
                    f"{prompt.id}, version {response.weight_version}, {len(prompt.token_ids)} tokens of prompt: log-probs"
                )
                print(f"differ by {differences}, experts at positions {rerouted.nonzero()[0]}")
                return False
    return True


def test_log_probs_and_routes_are_those_of_the_policy(recipe: Recipe, engine: SglangEngine):
    model = policy(recipe, seed=1)
    engine.update_weights(weights_of(model), version=1)
    groups = engine.generate(PROMPTS, 8, SETTINGS)
    reasons = set()
    for prompt, group in zip(PROMPTS, groups, strict=True):
        assert len(group) == 8
        for response in group:
            log_probs, routes = by_transformers(model, prompt, response, SETTINGS.temperature)
            np.testing.assert_allclose(response.log_probs, log_probs, atol=1e-4)
            assert response.routed_experts.dtype == np.uint8
            np.testing.assert_array_equal(np.sort(response.routed_experts), np.sort(routes))
            assert response.prompt_id == prompt.id
            assert response.weight_version == 1
            ended = response.token_ids[-1] in SETTINGS.stop_token_ids
            assert response.finish_reason == ("stop" if ended else "length")
            assert ended or len(response.token_ids) == SETTINGS.max_response_tokens
            reasons.add(response.finish_reason)
    assert reasons == {"stop", "length"}
    assert len({tuple(response.token_ids) for group in groups for response in group}) > 16


def test_greedy_responses_are_the_most_likely_tokens_at_temperature_one(recipe: Recipe, engine: SglangEngine):
    model = policy(recipe, seed=1)
    engine.update_weights(weights_of(model), version=2)
    (first, second), *_ = engine.generate(PROMPTS[:1], 2, replace(SETTINGS, temperature=0.0))
    assert first.token_ids.tolist() == second.token_ids.tolist()
    np.testing.assert_allclose(first.log_probs, by_transformers(model, PROMPTS[0], first, 1.0)[0], atol=1e-4)


def test_new_weights_sample_from_then_on_and_the_old_ones_are_deleted(recipe: Recipe, host: ServerHost):
    engine, before, after = engine_on(recipe, host), policy(recipe, seed=1), policy(recipe, seed=2)
    engine.update_weights(weights_of(before), version=1)
    assert sampled_by(before, engine.generate(PROMPTS, G, SETTINGS))
    engine.update_weights(weights_of(after), version=2)
    groups = engine.generate(PROMPTS, G, SETTINGS)
    assert sampled_by(after, groups)
    assert not sampled_by(before, groups)
    assert {response.weight_version for group in groups for response in group} == {2}
    run_id = engine._sync.label(0).partition(".")[0]
    assert [path.suffix for path in host.connection.weights_dir.glob(f"{run_id}*")] == [".2"]


def test_turns_of_one_response_are_those_of_one_policy_over_the_whole_sequence(recipe: Recipe, engine: SglangEngine):
    model, tokenizer = policy(recipe, seed=1), build_byte_tokenizer()
    engine.update_weights(weights_of(model), version=5)
    episodes = MultiTurn(engine, Talkative, tokenizer, max_turns=4, max_observation_tokens=8)
    groups, turns = episodes.generate(PROMPTS, G, SETTINGS), set()
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for response in group:
            log_probs, routes = by_transformers(model, prompt, response, SETTINGS.temperature)
            sampled = response.is_sampled
            np.testing.assert_allclose(response.log_probs[sampled], log_probs[sampled], atol=1e-4)
            np.testing.assert_array_equal(np.sort(response.routed_experts), np.sort(routes))
            turns.add(response.num_turns)
    assert max(turns) > 2


def test_responses_of_other_weights_are_refused_and_the_server_gets_the_right_ones(
    recipe: Recipe, host: ServerHost, tmp_path: Path
):
    engine, right, other = engine_on(recipe, host), policy(recipe, seed=1), policy(recipe, seed=2)
    engine.update_weights(weights_of(right), version=7)
    engine.take_counts()
    another_run = DiskWeightSync(tmp_path, "another_run")
    another_run.publish(weights_of(other), 7)
    engine._http.run(another_run.send(engine._http, host.connection.urls[0], 7))
    assert sampled_by(right, engine.generate(PROMPTS, G, SETTINGS))
    counts = engine.take_counts()
    assert counts["rollout/num_stale_responses"] >= 1
    assert counts["rollout/num_resyncs"] == 1


def test_verification_tells_the_weights_that_were_sent_from_others(recipe: Recipe, engine: SglangEngine):
    model, other = policy(recipe, seed=1), policy(recipe, seed=2)
    engine.update_weights(weights_of(model), version=3)
    prompt, token_ids = PROMPTS[0], np.arange(20, 40)
    response = Response(prompt.id, token_ids, np.zeros(20, dtype=np.float32), "length", 3)
    sequence = [prompt.token_ids[-1], *token_ids.tolist()]
    shortened = replace(prompt, token_ids=prompt.token_ids[-1:])
    engine.verify_weights(sequence, torch.from_numpy(by_transformers(model, shortened, response, 1.0)[0]), 1e-4)
    with pytest.raises(TrainingFailedError, match=r"weights version 3 the log-probs of .* differ"):
        engine.verify_weights(sequence, torch.from_numpy(by_transformers(other, shortened, response, 1.0)[0]), 1e-4)


@pytest.mark.parametrize("faults", [["500"] * 3, ["truncated"], ["not json"], ["refused"] * 2, ["hang"]], ids=" ".join)
def test_a_fault_costs_a_retry_and_no_response(faults: list[str], recipe: Recipe, host: ServerHost):
    model = policy(recipe, seed=1)
    with faulty_proxy(host.connection.urls[0], faults) as url:
        engine = engine_on(with_sglang(recipe, request_timeout_s=6.0), host, url)
        engine.update_weights(weights_of(model), version=1)
        groups = engine.generate(PROMPTS, G, SETTINGS)
        assert [len(group) for group in groups] == [G] * len(PROMPTS)
        assert sampled_by(model, groups)
        assert engine.take_counts()["rollout/num_retries"] >= len(faults)


def test_other_servers_take_over_from_one_that_is_gone(recipe: Recipe, host: ServerHost):
    model, server = policy(recipe, seed=1), host.connection.urls[0]
    with faulty_proxy(server, ["refused"] * 1000) as broken:
        engine = engine_on(recipe, host, broken, server)
        engine.update_weights(weights_of(model), version=1)
        assert sampled_by(model, engine.generate(PROMPTS, G, SETTINGS))
        assert engine.take_counts()["rollout/num_retries"] >= 1


def test_a_server_is_given_no_more_than_it_samples_at_one_time_and_a_slower_one_less(
    recipe: Recipe, host: ServerHost, monkeypatch: pytest.MonkeyPatch
):
    server, num_at_once = host.connection.urls[0], 3
    in_flight, most, served = Counter[str](), Counter[str](), Counter[str]()
    request = SglangHttp._request

    async def noted(self: SglangHttp, url: str, endpoint: str, *arguments: Any) -> httpx.Response:
        if endpoint != "/generate":
            return await request(self, url, endpoint, *arguments)
        in_flight[url] += 1
        most[url] = max(most[url], in_flight[url])
        answer = await request(self, url, endpoint, *arguments)
        await asyncio.sleep(0 if url == server else 2.0)
        in_flight[url] -= 1
        served[url] += 1
        return answer

    with faulty_proxy(server, []) as slow:
        engine = engine_on(with_sglang(recipe, max_requests_in_flight=num_at_once), host, server, slow)
        engine.update_weights(weights_of(policy(recipe, seed=1)), version=1)
        monkeypatch.setattr(SglangHttp, "_request", noted)
        engine.generate(PROMPTS, 8, replace(SETTINGS, max_response_tokens=4))
    assert most == {server: num_at_once, slow: num_at_once}
    assert served[server] + served[slow] == 8 * len(PROMPTS)
    assert 0 < served[slow] < served[server]


def test_a_step_waits_for_servers_no_longer_than_it_may(recipe: Recipe, host: ServerHost):
    with faulty_proxy(host.connection.urls[0], []) as url:
        engine = engine_on(with_sglang(recipe, outage_timeout_s=1.0), host, url)
        engine.update_weights(weights_of(policy(recipe, seed=1)), version=1)
    with pytest.raises(ServersGoneError, match=rf"no SGLang server has answered .* \(1 s\): {re.escape(url)}.*Connect"):
        engine.generate(PROMPTS, G, SETTINGS)


@pytest.mark.parametrize("key", ["weight_version", "output_token_logprobs", "routed_experts", "finish_reason"])
def test_an_answer_without_a_key_names_the_key_and_the_release(key: str, recipe: Recipe, host: ServerHost):
    with faulty_proxy(host.connection.urls[0], [f"no {key}"]) as url:
        engine = engine_on(recipe, host, url)
        engine.update_weights(weights_of(policy(recipe, seed=1)), version=1)
        with pytest.raises(ResponseSchemaError, match=rf"SGLang 0\.5\.21 answered without {key}"):
            engine.generate(PROMPTS[:1], 1, SETTINGS)


def test_weights_that_the_server_cannot_load_stop_the_run_and_name_the_reason(recipe: Recipe, host: ServerHost):
    engine = engine_on(recipe, host)
    with pytest.raises(TrainingFailedError, match="update_weights_from_disk answered 400"):
        engine.update_weights(iter([]), version=1)
    with pytest.raises(RuntimeError, match="no weights"):
        engine.generate(PROMPTS, G, SETTINGS)


def test_the_key_is_in_a_private_file_and_nowhere_else(host: ServerHost):
    servers = host.servers
    assert stat.S_IMODE(servers.key_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(servers.directory.stat().st_mode) == 0o700
    group, _ = servers.process_ids()
    in_group = [
        path
        for path in Path("/proc").glob("[0-9]*")
        if (path / "cmdline").exists() and os.getpgid(int(path.name)) == group
    ]
    assert len(in_group) >= 3  # the server, its scheduler and its detokenizer
    for process in in_group:
        assert servers.key.encode() not in (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
    log = (servers.directory / "server_0.log").read_text()
    assert "server_args" in log
    assert servers.key not in log
    assert servers.key not in repr(host.connection)


def test_a_server_on_the_cpu_imports_no_other_models_than_a_trainer_has(host: ServerHost):
    # SGLang says of each model of its own that lacks a kernel here that it could not be imported.
    assert "when loading sglang.srt.models" not in (host.servers.directory / "server_0.log").read_text()


def test_a_wrong_key_is_refused_before_anything_is_built(
    recipe_file: Path, host: ServerHost, program: Program, tmp_path: Path
):
    (tmp_path / "key").write_text("not-the-key")
    (tmp_path / "key").chmod(0o600)
    servers = [f"rollout.sglang.urls={host.connection.urls[0]}", f"rollout.sglang.key_file={tmp_path / 'key'}"]
    done = program.run("train", recipe_file, *servers, "--output-dir", tmp_path / "run")
    assert done.returncode == 2, done.stderr
    assert re.search(r"rollout\.sglang\.key_file: .*does not take the key", done.stderr)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_two_ranks_train_on_running_servers_with_the_engines_log_probs_and_routes(
    recipe_file: Path, host: ServerHost, program: Program, tmp_path: Path
):
    options = ["parallel.data=2", "rollout.old_log_probs=engine", "rollout.verify_weights=true"]
    options += ["rollout.sglang.weight_transport=broadcast", "rollout.sglang.release_memory=true"]
    done = program.run("train", recipe_file, *servers_of(host), *options, "--output-dir", tmp_path / "run", num_ranks=2)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["policy_version"] for line in lines] == [0, 1, 2]
    for line in lines[1:]:
        assert 0 < line["mismatch/log_prob_abs_mean"] < 1e-4
        assert line["routing/replayed_token_fraction"] == 1.0
        assert line["routing/engine_disagreement"] == 0.0
        assert line["rollout/num_stale_responses"] == line["rollout/num_retries"] == 0
        assert line["throughput/weight_sync_gb_per_s"] > 0
        assert line["grad_norm"] > 0
    for file in (path for path in (tmp_path / "run").rglob("*") if path.is_file()):
        assert host.connection.key.encode() not in file.read_bytes(), f"{file} has the key"


def test_a_server_goes_on_sampling_when_every_process_of_the_job_is_asked_to_stop(recipe: Recipe, host: ServerHost):
    engine, model = engine_on(recipe, host), policy(recipe, seed=1)
    engine.update_weights(weights_of(model), version=1)
    engine.take_counts()
    group, _ = host.servers.process_ids()

    def ask_to_stop() -> None:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            os.killpg(group, number)

    asking = threading.Timer(0.5, ask_to_stop)
    asking.start()
    groups = engine.generate(PROMPTS, 8, replace(SETTINGS, max_response_tokens=200, stop_token_ids=()))
    asking.join()
    afterwards = engine.generate(PROMPTS, 1, SETTINGS)
    assert sampled_by(model, groups)
    assert sampled_by(model, afterwards)
    counts = engine.take_counts()
    assert counts["rollout/num_restarts"] == counts["rollout/num_retries"] == 0
    assert host.servers.process_ids()[0] == group


def test_servers_killed_or_hung_while_they_sample_are_started_again_and_no_response_is_lost(
    recipe: Recipe, host: ServerHost, monkeypatch: pytest.MonkeyPatch
):
    """Each server has an engine of its own, so each response is that of a server that came back with the right weights."""
    wait_until(lambda: both_are_up(host), "both servers are up")
    model, servers = policy(recipe, seed=1), host.servers
    long = replace(SETTINGS, max_response_tokens=200, stop_token_ids=())
    engines = [engine_on(recipe, host, url) for url in host.connection.urls]
    for engine in engines:
        engine.update_weights(weights_of(model), version=1)
        engine.take_counts()
    hung, killed = servers.process_ids()

    def fail() -> None:
        os.killpg(hung, signal.SIGSTOP)
        os.killpg(killed, signal.SIGKILL)
        with monkeypatch.context() as patch:
            patch.setattr(servers, "section", servers.section.model_copy(update={"hang_timeout_s": 8 * LOOK_EVERY_S}))
            wait_until(lambda: not {hung, killed} & set(servers.process_ids()), "the silent server is ended")

    failing = threading.Timer(1.0, fail)
    failing.start()
    with ThreadPoolExecutor() as threads:
        sampled = list(threads.map(lambda engine: engine.generate(PROMPTS, 8, long), engines))
    failing.join()
    counts = [engine.take_counts() for engine in engines]
    assert sum(count["rollout/num_restarts"] for count in counts) == 2
    for groups, count in zip(sampled, counts, strict=True):
        assert [len(group) for group in groups] == [8] * len(PROMPTS)
        assert sampled_by(model, groups)
        assert count["rollout/num_resyncs"] == 1
        assert count["rollout/num_retries"] >= 1


SIGKILLED_TRAINER = """
import sys, threading, time
from pathlib import Path
from megatron_gspo.config import load_recipe
from megatron_gspo.rollout.sglang_server import ServerModel, SglangServers
recipe = load_recipe(Path(sys.argv[1]), ["rollout.sglang.num_servers=1"])
model = ServerModel(recipe.model.path, "float32", on_cpu=True, return_routed_experts=False)
servers = SglangServers(recipe.rollout.sglang, model, Path(sys.argv[2]))
threading.Thread(target=servers.start, daemon=True).start()
while not servers.process_ids():
    time.sleep(0.05)
print(*servers.process_ids(), flush=True)
time.sleep(600)
"""


def test_servers_end_when_the_trainer_is_killed(recipe_file: Path, tmp_path: Path):
    command = [sys.executable, "-c", SIGKILLED_TRAINER, recipe_file, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as trainer:
        server = int(trainer.stdout.readline().split()[0])
        trainer.kill()
    assert wait_until_gone(server)
