"""A server that computes in bfloat16 beside a trainer in float32 (§5.4), and servers that are gone for good."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_gspo import parallel
from megatron_gspo.config import ParallelSection, Recipe
from megatron_gspo.model.hf_weights import export_hf_weights
from megatron_gspo.policy_loss import finalize_metrics, policy_loss
from megatron_gspo.rollout.sglang import ServerHost
from megatron_gspo.training.assembly import build_models
from megatron_gspo.training.experience import MiniBatch, pack_samples
from megatron_gspo.training.forward import token_log_probs
from megatron_gspo.training.old_policy import record_mismatch
from megatron_gspo.training.routing import RoutingControl, StepRoutes
from megatron_gspo.training.totals import Totals
from megatron_gspo.types import Prompt, Response, Sample, SamplingSettings
from tests.rollout.real_server import engine_on, with_sglang

ROOT = Path(__file__).parents[2]
LONG = SamplingSettings(max_response_tokens=48)
STEPS, PROMPTS_PER_STEP = 6, 4


@pytest.fixture(scope="module")
def bfloat16_host(recipe: Recipe) -> Iterator[ServerHost]:
    started = ServerHost(with_sglang(recipe, dtype="bfloat16", num_servers=1), on_cpu=True)
    yield started
    started.close()


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


def test_when_all_servers_are_gone_the_run_is_saved_and_goes_on_with_others(
    recipe_file: Path, host: ServerHost, bfloat16_host: ServerHost, tmp_path: Path
):
    run = tmp_path / "run"
    options = [f"training.steps={STEPS}", "parallel.data=2", "rollout.sglang.outage_timeout_s=2", "data.eval=null"]
    options += ["rollout.max_response_tokens=64"]
    with start(recipe_file, *options, *servers_of(bfloat16_host), "--output-dir", run) as stopped:
        while not lines_of(run):
            assert stopped.poll() is None, stopped.stderr.read()
            time.sleep(0.05)
        kill_for_good(bfloat16_host)
        _, said = stopped.communicate(timeout=300)
    last = lines_of(run)[-1]["step"]
    assert stopped.returncode == 75, said
    assert "no SGLang server has answered for rollout.sglang.outage_timeout_s (2 s): http://" in said
    assert "Traceback" not in said
    assert 0 < last < STEPS
    assert cursor(run, last) == last * PROMPTS_PER_STEP

    with start(recipe_file, *options, *servers_of(host), "--output-dir", run, "--resume") as resumed:
        _, said = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, said
    assert [(line["step"], line["policy_version"]) for line in lines_of(run)] == [(n, n) for n in range(1, STEPS + 1)]
    assert cursor(run, STEPS) == STEPS * PROMPTS_PER_STEP, "each prompt was learned from once"


def kill_for_good(host: ServerHost) -> None:
    """Kill the server as often as it is started again, until it is given up."""
    servers = host.servers
    deadline = time.monotonic() + 120
    while not servers._servers[0].given_up:
        assert time.monotonic() < deadline
        for process in servers.process_ids():
            os.killpg(process, signal.SIGKILL)
        time.sleep(0.2)


def servers_of(host: ServerHost) -> list[str]:
    return [f"rollout.sglang.urls={host.connection.urls[0]}", f"rollout.sglang.key_file={host.servers.key_file}"]


def lines_of(run: Path) -> list[dict[str, float]]:
    metrics = run / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


def cursor(run: Path, step: int) -> int:
    return json.loads((run / "checkpoints" / f"step_{step}" / "state.json").read_text())["prompts"]["cursor"]


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_gspo", "train", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
