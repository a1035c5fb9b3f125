"""The rollout engine of SGLang servers: `engine.RolloutEngine` over HTTP.

In: prompts, and the policy's weights. Out: responses as `engine.RolloutEngine` promises them. One process of a run, its
first, starts the servers and sends the weights; it hands a `ServerConnection` to the others, and each drives prompts of
its own. No response is ever taken that other weights than the current ones sampled: servers name the weights they
answered with, and one that was started anew is given the current ones first.

Sampling is not repeatable here: what a server batches together, and so the last bits of its sums, depends on when
requests arrive.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_gspo.config import Recipe
from megatron_gspo.rollout.engine import RolloutEngine
from megatron_gspo.rollout.serve import KEY_NAME, find_servers
from megatron_gspo.rollout.sglang_client import Endpoint, SglangClient
from megatron_gspo.rollout.sglang_http import ServerFaultError, SglangHttp
from megatron_gspo.rollout.sglang_memory import release, resume_cache, resume_weights
from megatron_gspo.rollout.sglang_response import SUPPORTED_VERSION, RoutesShape, dense_layers
from megatron_gspo.rollout.sglang_server import SglangServers, model_to_serve, read_key
from megatron_gspo.rollout.weight_sync import WeightSync
from megatron_gspo.rollout.weight_sync_broadcast import BroadcastWeightSync
from megatron_gspo.rollout.weight_sync_broadcaster import WeightBroadcaster
from megatron_gspo.rollout.weight_sync_disk import DiskWeightSync
from megatron_gspo.types import OpenGroup, SamplingSettings, TrainingFailedError, UserError

#: What a server may take to answer beside the time limit of what it is asked to do.
ANSWER_MARGIN_S = 10.0


@dataclass(frozen=True)
class ServerConnection:
    """What a process needs to speak to a run's servers. It holds the key: not for logs, files or command lines."""

    urls: tuple[str, ...]
    key: str
    run_id: str
    weights_dir: Path

    def __repr__(self) -> str:
        return f"ServerConnection(urls={self.urls}, run_id={self.run_id})"


class ServerHost:
    """What the run's first process owns: servers it started, and the directory of weights."""

    def __init__(self, recipe: Recipe, *, on_cpu: bool, servers: Path | None = None) -> None:
        """Start servers, or connect to those the recipe names, or to those of a job.

        Args:
            recipe: its `rollout` section says which.
            on_cpu: whether servers that are started here run without CUDA.
            servers: the directory in which `megatron-gspo serve` leaves a job's servers (`rollout.serve`).

        Raises:
            UserError: SGLang is not installed, servers do not come up or do not answer, or the key is wrong.
        """
        section = recipe.rollout.sglang
        require_servable(recipe)
        self.on_cpu = on_cpu
        self._directory = tempfile.TemporaryDirectory(prefix="megatron_gspo_sglang_")  # mode 0700
        private = Path(self._directory.name)
        self.servers: SglangServers | None = None
        if servers is not None:
            urls = find_servers(servers, section.startup_timeout_s)
            key = read_key(servers / KEY_NAME)
        elif section.urls is None:
            self.servers = SglangServers(section, model_to_serve(recipe, on_cpu=on_cpu), private)
            self.servers.start()
            urls, key = self.servers.urls, self.servers.key
        else:
            assert section.key_file is not None, "the recipe's check holds this"
            urls, key = section.server_urls(), read_key(section.key_file)
        weights_dir = section.weights_dir or (servers or private) / "weights"
        self.connection = ServerConnection(tuple(urls), key, secrets.token_hex(8), weights_dir)

    def close(self) -> None:
        """End the servers that were started, and delete the weights. Closing twice is allowed."""
        if self.servers is not None:
            self.servers.close()
        DiskWeightSync(self.connection.weights_dir, self.connection.run_id).forget_all()
        self._directory.cleanup()


class SglangEngine(RolloutEngine):
    """Samples from SGLang servers."""

    def __init__(
        self,
        recipe: Recipe,
        connection: ServerConnection,
        *,
        host: ServerHost | None = None,
        num_clients: int = 1,
        is_stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        """Connect to servers, and see that they are what the run needs.

        Args:
            recipe: its `rollout` and `routing` sections, and the model's config.json.
            connection: to the servers.
            host: on the process that owns them and sends the weights; None on the others.
            num_clients: processes of the run that drive prompts, which share what a server samples at one time.
            is_stop_requested: asked while no server answers; a run that is to stop waits for none (EngineGoneError).

        Raises:
            UserError: a server does not answer, does not take the key, or does not return the routes the run replays.
        """
        section = recipe.rollout.sglang
        self._host = host
        self._sync = _weight_sync(recipe, connection, host)
        self._shares_memory = section.release_memory
        self._http = SglangHttp(connection.key, section.request_timeout_s)
        replays = recipe.routing.replay == "r3"
        self._client = SglangClient(
            self._http,
            connection.urls,
            self._sync,
            requests_per_server=max(1, section.max_requests_in_flight // num_clients),
            outage_timeout_s=section.outage_timeout_s,
            is_stop_requested=is_stop_requested,
            routes=RoutesShape.of(_read_config(recipe.model.path)) if replays else None,
        )
        self._version: int | None = None
        self._closed = False
        try:
            self._http.run(self._look_at_servers(return_routed_experts=replays))
        except BaseException:
            self._sync.close()
            raise

    @property
    def weight_version(self) -> int:
        """See `RolloutEngine.weight_version`."""
        if self._version is None or self._closed:
            raise RuntimeError("the rollout engine has no weights: no update has succeeded yet, or it is closed")
        return self._version

    def generate_until(
        self,
        groups: Sequence[OpenGroup],
        num_complete: int,
        settings: SamplingSettings,
        interrupt: threading.Event | None = None,
    ) -> list[OpenGroup]:
        """See `RolloutEngine.generate_until`, and `SglangClient.sample` for what else is raised."""
        return self._http.run(self._client.sample(groups, num_complete, settings, self.weight_version, interrupt))

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """See `RolloutEngine.update_weights`. Where another process owns the servers, `weights` is left alone.

        Returns on the owner when every server that answers computes with them; the others may sample after that.

        Raises:
            TrainingFailedError: the weights cannot be written, or a server refuses them.
        """
        self._version = None
        if self._host is not None:
            released = self._http.run(self._resume_weights())
            self._sync.publish(weights, version)
            self._http.run(self._client.send_weights(version))
            self._http.run(self._on_each(released, resume_cache))
            self._sync.forget_before(version)
        self._version = version

    def release_memory(self) -> None:
        """See `RolloutEngine.release_memory`. Where the recipe does not ask for it, nothing is done."""
        if self._host is not None and self._shares_memory and self._version is not None:
            label = self._sync.label(self._version)
            in_use = [endpoint for endpoint in self._client.endpoints if not endpoint.is_out]
            self._version = None
            self._http.run(self._on_each(in_use, lambda http, url: release(http, url, label)))

    def verify_weights(self, token_ids: Sequence[int], log_probs: torch.Tensor, tolerance: float) -> None:
        """Compare what each server in use computes for a sequence with the trainer's log-probs; on their owner alone.

        Args:
            token_ids: the sequence.
            log_probs: [tokens - 1], of all tokens but the first, at temperature 1.
            tolerance: the largest difference allowed.

        Raises:
            TrainingFailedError: a server's differ by more: it does not compute with the weights it was sent.
        """
        for endpoint in self._client.endpoints if self._host is not None else ():
            if endpoint.is_out:
                continue
            try:
                found = self._http.run(self._client.sequence_log_probs(endpoint, token_ids))
            except ServerFaultError as fault:
                self._client.take_out(endpoint, str(fault))
                continue
            difference = float((torch.tensor(found) - log_probs.cpu().float()).abs().max())
            if not difference <= tolerance:
                raise TrainingFailedError(
                    f"rollout.verify_weights: with weights version {self._version} the log-probs of {endpoint.url} differ "
                    f"from the trainer's by {difference:.2g}, more than {tolerance:g}"
                )

    def take_counts(self) -> dict[str, float]:
        """See `RolloutEngine.take_counts`: retries, stale responses, re-synchronisations, and servers started again."""
        names = ("rollout/num_retries", "rollout/num_stale_responses", "rollout/num_resyncs")
        counts = {name: float(self._client.counts[name]) for name in names}
        counts["rollout/num_resyncs"] += self._sync.take_resyncs()
        self._client.counts.clear()
        restarts = self._host.servers.take_restarts() if self._host is not None and self._host.servers else 0
        return counts | {"rollout/num_restarts": float(restarts)}

    def close(self) -> None:
        """See `RolloutEngine.close`."""
        self._closed = True
        self._sync.close()
        if self._host is not None:
            self._host.close()

    async def _resume_weights(self) -> list[Endpoint]:
        """The servers that had released their memory, which now have that of the weights again."""
        if not self._shares_memory:
            return []
        released: list[Endpoint] = []

        async def resume(http: SglangHttp, url: str) -> None:
            if await resume_weights(http, url):
                released.append(next(endpoint for endpoint in self._client.endpoints if endpoint.url == url))

        await self._on_each(self._client.endpoints, resume)
        return released

    async def _on_each(
        self, endpoints: Sequence[Endpoint], do: Callable[[SglangHttp, str], Coroutine[Any, Any, None]]
    ) -> None:
        """Ask something of servers at the same time; one that fails over it is out of use."""
        results = await asyncio.gather(
            *(do(self._http, endpoint.url) for endpoint in endpoints), return_exceptions=True
        )
        for endpoint, result in zip(endpoints, results, strict=True):
            if isinstance(result, ServerFaultError):
                self._client.take_out(endpoint, str(result))
            elif result is not None:
                raise result

    async def _look_at_servers(self, *, return_routed_experts: bool) -> None:
        for endpoint in self._client.endpoints:
            await self._look_at(endpoint, return_routed_experts=return_routed_experts)

    async def _look_at(self, endpoint: Endpoint, *, return_routed_experts: bool) -> None:
        try:
            info = await self._http.ask(endpoint.url, "/server_info")
        except ServerFaultError as fault:
            raise UserError(f"rollout.sglang.urls: an SGLang server does not answer: {fault}") from fault
        endpoint.sglang_version = str(info.get("version")) if isinstance(info, dict) else "(unknown)"
        if endpoint.sglang_version != SUPPORTED_VERSION:
            raise UserError(
                f"rollout.sglang: the server at {endpoint.url} is SGLang {endpoint.sglang_version}; accepted: "
                f"{SUPPORTED_VERSION}, whose answers this version reads"
            )
        if return_routed_experts and not info.get("enable_return_routed_experts"):
            raise UserError(
                f"routing.replay: r3 replays the servers' routes, and the server at {endpoint.url} was started without "
                "--enable-return-routed-experts"
            )
        on_gpu = str(info.get("device")) != "cpu"
        if self._shares_memory and on_gpu and not info.get("enable_memory_saver"):
            raise UserError(
                f"rollout.sglang.release_memory: the server at {endpoint.url} was started without --enable-memory-saver"
            )


def _weight_sync(recipe: Recipe, connection: ServerConnection, host: ServerHost | None) -> WeightSync:
    """The recipe's way for weights to reach servers."""
    section = recipe.rollout.sglang
    if section.weight_transport == "disk":
        return DiskWeightSync(connection.weights_dir, connection.run_id)
    if host is None:
        return BroadcastWeightSync(connection.run_id, None)
    broadcaster = WeightBroadcaster(
        connection.urls,
        SglangHttp(connection.key, section.weight_timeout_s + ANSWER_MARGIN_S),
        # NCCL does not take two ranks on one GPU.
        backend="gloo" if host.on_cpu or section.release_memory else "nccl",
        bucket_bytes=section.weight_bucket_bytes,
        timeout_s=section.weight_timeout_s,
        restart=host.servers.restart if host.servers is not None else None,
    )
    return BroadcastWeightSync(connection.run_id, broadcaster)


def require_servable(recipe: Recipe) -> None:
    """Refuse a model that SGLang would not serve, or would serve as another one.

    Raises:
        UserError: its config.json names no architecture, or dense layers among MoE layers.
    """
    config = _read_config(recipe.model.path)
    if not config.get("architectures"):
        expected = {"qwen3": "Qwen3ForCausalLM"}.get(str(config.get("model_type")), "Qwen3MoeForCausalLM")
        raise UserError(
            f"model.path: {recipe.model.path}/config.json names no architectures, by which SGLang chooses its model; "
            f'accepted: "architectures": ["{expected}"]'
        )
    if config.get("model_type") == "qwen3_moe" and (dense := dense_layers(config)):
        raise UserError(
            f"model.path: {recipe.model.path}/config.json makes layers {dense} dense (mlp_only_layers, decoder_sparse_step), "
            f"and SGLang {SUPPORTED_VERSION} gives every layer of a qwen3_moe model experts; accepted under "
            "rollout.engine: sglang is a model of MoE layers alone"
        )


def _read_config(path: Path) -> dict[str, Any]:
    config = json.loads((path / "config.json").read_text())
    assert isinstance(config, dict), "the recipe's check holds this"
    return config
