"""A server that computes in bfloat16 beside a trainer in float32 (§5.4), and servers that are gone for good."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_gspo import parallel
from megatron_gspo.config import ParallelSection, Recipe
from megatron_gspo.model.hf_weights import export_hf_weights
from megatron_gspo.policy_loss import finalize_metrics, policy_loss
from megatron_gspo.rollout import sglang_server
from megatron_gspo.rollout.sglang import ServerHost
from megatron_gspo.training.assembly import build_models
from megatron_gspo.training.experience import MiniBatch, pack_samples
from megatron_gspo.training.forward import token_log_probs
from megatron_gspo.training.old_policy import record_mismatch
from megatron_gspo.training.routing import RoutingControl, StepRoutes
from megatron_gspo.training.totals import Totals
from megatron_gspo.types import Prompt, Response, Sample, SamplingSettings
from tests.end_to_end.program import Ended, Program
from tests.rollout.real_server import engine_on, faulty_proxy, servers_of, wait_until

LONG = SamplingSettings(max_response_tokens=48)
STEPS, PROMPTS_PER_STEP = 6, 4
STEADY = [f"training.steps={STEPS}", "parallel.data=2", "data.eval=null", "rollout.max_response_tokens=64"]


def prompts() -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [Prompt(f"test:{index}", tuple(rng.integers(3, 250, 8).tolist()), "", "") for index in range(12)]


def samples_of(groups: Sequence[tuple[Response, ...]]) -> list[Sample]:
    pairs = [(prompt, response) for prompt, group in zip(prompts(), groups, strict=True) for response in group]
    return [
        Sample(index, np.array(prompt.token_ids), response.token_ids, 1.0, response.log_probs, response.routed_experts)
        for index, (prompt, response) in enumerate(pairs)
    ]


class Trainer:
    """The real policy in float32, scoring what servers sampled with its weights."""

    def __init__(self, recipe: Recipe) -> None:
        parallel.initialize_distributed()
        parallel.initialize_model_parallel(ParallelSection(), seed=1)
        self.recipe = recipe
        self.models = build_models(recipe)
        self.routing = RoutingControl(self.models, recipe)

    def metrics(self, samples: Sequence[Sample], *, replay: bool) -> dict[str, float]:
        """`mismatch/*`, and the metrics of GRPO's loss whose old policy is the engine (§5.4)."""
        micro_batches = pack_samples(samples, self.recipe, 0)
        num_tokens = sum(len(sample.response_token_ids) for sample in samples)
        batch, totals = MiniBatch(micro_batches, len(samples), num_tokens), Totals()
        with self.routing.old_policy_pass(self._routes(samples, batch) if replay else StepRoutes(), [batch]):
            log_probs = token_log_probs(self.models, micro_batches, temperature=1.0)
        record_mismatch(log_probs, batch, totals)
        for current, packed in zip(log_probs, micro_batches, strict=True):
            behaviour, bounds = packed.behaviour_log_probs, packed.response_cu_seqlens
            totals.add_all(policy_loss("grpo", current, behaviour, packed.advantages, bounds).metrics)
        return finalize_metrics(totals.sums)

    def _routes(self, samples: Sequence[Sample], batch: MiniBatch) -> StepRoutes:
        class Rollouts:
            def routed_experts(self) -> dict[int, np.ndarray | None]:
                return {sample.index: sample.routed_experts for sample in samples}

        return self.routing.begin_step(Rollouts(), [batch])


def test_bfloat16_is_a_real_mismatch_and_replaying_its_routes_lowers_it(
    recipe: Recipe, host: ServerHost, bfloat16_host: ServerHost
):
    trainer = Trainer(recipe)
    found = {}
    for name, servers in (("float32", host), ("bfloat16", bfloat16_host)):
        engine = engine_on(recipe, servers)
        engine.update_weights(export_hf_weights(trainer.models), version=1)
        samples = samples_of(engine.generate(prompts(), 4, LONG))
        found[name] = {replay: trainer.metrics(samples, replay=replay) for replay in (False, True)}
    exact, live, replayed = found["float32"][False], found["bfloat16"][False], found["bfloat16"][True]
    assert exact["mismatch/log_prob_abs_mean"] < 1e-5
    assert live["mismatch/log_prob_abs_mean"] > 1e-3
    # The same responses: only who chose the experts differs. On this model the spread is about a quarter, the KL a twentieth.
    assert replayed["mismatch/log_prob_abs_mean"] < 0.8 * live["mismatch/log_prob_abs_mean"]
    assert replayed["mismatch/kl"] < 0.5 * live["mismatch/kl"]
    for unit in ("token", "sequence"):
        assert replayed[f"ratio/{unit}_log_std"] < 0.7 * live[f"ratio/{unit}_log_std"]


def test_a_run_that_waits_for_servers_is_saved_once_a_rank_is_asked_to_stop(
    recipe_file: Path, host: ServerHost, program: Program, tmp_path: Path
):
    run = tmp_path / "run"
    with faulty_proxy(host.connection.urls[0], []) as url:  # the step would wait 900 s for what it leads to
        asked = program.start("train", recipe_file, *STEADY, *servers_of(host, url), "--output-dir", run, num_ranks=2)
        wait_until(lambda: bool(lines_of(run)) or asked.has_ended(), "a step is made")
    wait_until(lambda: "out of use" in asked.said("stderr") or asked.has_ended(), "the first rank waits")
    asked.signal(signal.SIGUSR1, rank=1)
    assert_saved(asked.wait(300), run, "no SGLang server answers, and the run was asked to stop: http://")


def test_when_all_servers_are_gone_the_run_is_saved_and_goes_on_with_others(
    recipe_file: Path,
    host: ServerHost,
    bfloat16_host: ServerHost,
    program: Program,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    run = tmp_path / "run"
    options = ["train", recipe_file, *STEADY, "rollout.sglang.outage_timeout_s=2", "--output-dir", run]
    killed = program.start(*options, *servers_of(bfloat16_host), num_ranks=2)
    wait_until(lambda: bool(lines_of(run)) or killed.has_ended(), "a step is made")
    kill_for_good(bfloat16_host, monkeypatch)
    words = "no SGLang server has answered for rollout.sglang.outage_timeout_s (2 s): http://"
    assert_saved(killed.wait(300), run, words)

    ended = program.run(*options, *servers_of(host), "--resume", num_ranks=2)
    assert ended.returncode == 0, ended.stderr
    assert [(line["step"], line["policy_version"]) for line in lines_of(run)] == [(n, n) for n in range(1, STEPS + 1)]
    assert cursor(run, STEPS) == STEPS * PROMPTS_PER_STEP, "each prompt was learned from once"


def assert_saved(ended: Ended, run: Path, words: str) -> None:
    """The run's last finished step is saved, it is not the recipe's last, and it is said why."""
    last = int(lines_of(run)[-1]["step"])
    assert ended.returncode == 75, ended.stderr
    assert words in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    assert 0 < last < STEPS
    assert cursor(run, last) == last * PROMPTS_PER_STEP


def kill_for_good(host: ServerHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill the server as often as it is started again, until it is given up."""
    monkeypatch.setattr(sglang_server, "MAX_RESTARTS", 1)
    monkeypatch.setattr(sglang_server, "RESTART_PAUSE_S", 0.2)

    def is_given_up() -> bool:
        for process in host.servers.process_ids():
            os.killpg(process, signal.SIGKILL)
        return host.servers.are_given_up

    wait_until(is_given_up, "the server is given up")


def lines_of(run: Path) -> list[dict[str, float]]:
    metrics = run / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


def cursor(run: Path, step: int) -> int:
    return json.loads((run / "checkpoints" / f"step_{step}" / "state.json").read_text())["prompts"]["cursor"]
