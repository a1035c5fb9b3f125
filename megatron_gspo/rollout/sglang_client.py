"""Many responses in flight over several SGLang servers, whatever happens to some of the servers.

In: prompts, settings, the version of the current weights. Out: each prompt's responses, each exactly once.

Every server has workers, as many as responses it samples at one time; a worker takes the next response that is still to
be sampled, so a faster server takes more of them and no queue forms at a server. A fault takes the server out: its
responses go back to be sampled by any server, and it comes in again once it answers, after pauses that double, and only
with the current weights, which it is given if it has others.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_gspo.rollout.engine import EngineGoneError
from megatron_gspo.rollout.sglang_http import ServerFaultError, SglangHttp
from megatron_gspo.rollout.sglang_response import (
    Expected,
    ResponseSchemaError,
    RoutesShape,
    StaleWeightsError,
    decode_answer,
    request_body,
)
from megatron_gspo.rollout.weight_sync import WeightSync
from megatron_gspo.types import Prompt, Response, SamplingSettings, TrainingFailedError

logger = logging.getLogger(__name__)

#: A response that this many servers failed over, one after the other, is what makes them fail.
MAX_ATTEMPTS = 6
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0
LOOK_EVERY_S = 0.5


class ServersGoneError(EngineGoneError):
    """No server has answered for longer than the recipe allows."""


@dataclass
class Endpoint:
    """One server, as the client sees it."""

    url: str
    sglang_version: str = "(unknown)"
    faults: int = 0  # since its last answer
    fault: str = ""
    is_out: bool = False


@dataclass
class _Job:
    """One response to be sampled."""

    position: int
    prompt: Prompt
    faults: int = 0


@dataclass
class _Sampling:
    """One call's work."""

    jobs: deque[_Job]
    settings: SamplingSettings
    version: int
    responses: list[Response | None]
    unfinished: int
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)  # jobs, unfinished, or an endpoint's is_out
    returns: set[asyncio.Task[None]] = field(default_factory=set)


class SglangClient:
    """Samples responses from servers that hold the same weights."""

    def __init__(
        self,
        http: SglangHttp,
        urls: Sequence[str],
        sync: WeightSync,
        *,
        requests_per_server: int,
        outage_timeout_s: float,
        routes: RoutesShape | None,
    ) -> None:
        """
        Args:
            http: with the servers' key.
            urls: the servers.
            sync: how a server that has other weights gets the current ones.
            requests_per_server: responses of this client that a server samples at one time.
            outage_timeout_s: how long to wait while no server answers.
            routes: what routed experts look like; None where they are not asked for.
        """
        self.endpoints = [Endpoint(url) for url in urls]
        self.counts: Counter[str] = Counter()  # what happened, by metric name
        self._http = http
        self._sync = sync
        self._requests_per_server = requests_per_server
        self._outage_timeout_s = outage_timeout_s
        self._routes = routes

    async def generate(
        self, prompts: Sequence[Prompt], responses_per_prompt: int, settings: SamplingSettings, version: int
    ) -> list[tuple[Response, ...]]:
        """G responses to each prompt, in order, all sampled by the weights of `version`.

        Raises:
            ServersGoneError: no server has answered for the outage's time limit.
            ResponseSchemaError: an answer is not what this program reads.
            TrainingFailedError: a request is refused, or fails with every server.
            UserError: a server does not take the key.
        """
        wanted = [prompt for prompt in prompts for _ in range(responses_per_prompt)]
        if not wanted:
            return [() for _ in prompts]
        jobs = deque(_Job(position, prompt) for position, prompt in enumerate(wanted))
        sampling = _Sampling(jobs, settings, version, [None] * len(wanted), len(wanted))
        workers_per_server = min(self._requests_per_server, len(wanted))
        try:
            async with asyncio.TaskGroup() as tasks:
                # Workers start in this order, so servers' loads are even from the first response on.
                workers = [
                    tasks.create_task(self._work(endpoint, sampling, tasks))
                    for _ in range(workers_per_server)
                    for endpoint in self.endpoints
                ]
                for endpoint in self.endpoints:
                    if endpoint.is_out:
                        self._bring_back(endpoint, sampling, tasks)
                workers.append(tasks.create_task(self._watch_for_outage()))
                async with sampling.changed:
                    await sampling.changed.wait_for(lambda: sampling.unfinished == 0)
                for task in (*workers, *sampling.returns):
                    task.cancel()
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from failed
        done = [response for response in sampling.responses if response is not None]
        assert len(done) == len(wanted), "every response was sampled"
        starts = range(0, len(done), responses_per_prompt)
        return [tuple(done[start : start + responses_per_prompt]) for start in starts]

    async def send_weights(self, version: int) -> None:
        """Give every server the published weights; one that fails gets them before it samples again.

        Raises:
            RequestRefusedError: a server does not take them.
        """
        results = await asyncio.gather(
            *(self._sync.send(self._http, endpoint.url, version) for endpoint in self.endpoints), return_exceptions=True
        )
        for endpoint, result in zip(self.endpoints, results, strict=True):
            if isinstance(result, ServerFaultError):
                self.take_out(endpoint, str(result))
            elif isinstance(result, BaseException):
                raise result
            else:
                endpoint.is_out, endpoint.faults = False, 0

    async def sequence_log_probs(self, endpoint: Endpoint, token_ids: Sequence[int]) -> list[float]:
        """What a server computes for a sequence: log-probs of all tokens but the first, at temperature 1."""
        body = {
            "input_ids": list(token_ids),
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0, "ignore_eos": True},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        answer = await self._http.ask(endpoint.url, "/generate", body)
        try:
            entries = answer["meta_info"]["input_token_logprobs"][1:]
            log_probs = [float(entry[0]) for entry in entries]
        except (KeyError, TypeError, IndexError) as error:
            raise ResponseSchemaError(
                f"SGLang {endpoint.sglang_version} answered without meta_info.input_token_logprobs of [log-prob, token id]"
            ) from error
        assert len(log_probs) == len(token_ids) - 1, "one log-prob a token"
        return log_probs

    async def _work(self, endpoint: Endpoint, sampling: _Sampling, tasks: asyncio.TaskGroup) -> None:
        """Sample one response after the other with one server, until none is left."""
        while True:
            async with sampling.changed:
                await sampling.changed.wait_for(lambda: bool(sampling.jobs) and not endpoint.is_out)
                job = sampling.jobs.popleft()
            try:
                response = await self._sample(endpoint, job, sampling)
            except (ServerFaultError, StaleWeightsError) as fault:
                stale = isinstance(fault, StaleWeightsError)
                self.counts["rollout/num_stale_responses" if stale else "rollout/num_retries"] += 1
                job.faults += not stale
                if job.faults >= MAX_ATTEMPTS:
                    raise TrainingFailedError(
                        f"a response to {job.prompt.id} failed {MAX_ATTEMPTS} times, the last: {fault}"
                    ) from fault
                async with sampling.changed:
                    sampling.jobs.appendleft(job)
                    if not endpoint.is_out:
                        self.take_out(endpoint, str(fault))
                        self._bring_back(endpoint, sampling, tasks)
                    sampling.changed.notify_all()
                continue
            endpoint.faults = 0
            async with sampling.changed:
                assert sampling.responses[job.position] is None, "a response is sampled once"
                sampling.responses[job.position] = response
                sampling.unfinished -= 1
                if sampling.unfinished == 0:
                    sampling.changed.notify_all()

    async def _sample(self, endpoint: Endpoint, job: _Job, sampling: _Sampling) -> Response:
        body = request_body(job.prompt, sampling.settings, return_routed_experts=self._routes is not None)
        answer = await self._http.ask(endpoint.url, "/generate", body)
        expected = Expected(self._sync.label(sampling.version), sampling.version, self._routes, endpoint.sglang_version)
        return decode_answer(answer, job.prompt, sampling.settings, expected)

    def take_out(self, endpoint: Endpoint, fault: str) -> None:
        """Ask a server for nothing until it answers again and has the current weights."""
        endpoint.is_out, endpoint.fault = True, fault
        endpoint.faults += 1
        logger.warning("SGLang server out of use: %s", fault)

    def _bring_back(self, endpoint: Endpoint, sampling: _Sampling, tasks: asyncio.TaskGroup) -> None:
        task = tasks.create_task(self._return_when_current(endpoint, sampling))
        sampling.returns.add(task)
        task.add_done_callback(sampling.returns.discard)

    async def _return_when_current(self, endpoint: Endpoint, sampling: _Sampling) -> None:
        """Wait until a server answers, give it the current weights if it has others, and use it again."""
        label = self._sync.label(sampling.version)
        while True:
            await asyncio.sleep(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(endpoint.faults, 10)))
            try:
                await self._http.ask(endpoint.url, "/health")
                if await self._weight_label(endpoint) != label:
                    await self._sync.send(self._http, endpoint.url, sampling.version)
                    self.counts["rollout/num_resyncs"] += 1
                if await self._weight_label(endpoint) == label:
                    break
                endpoint.fault = f"{endpoint.url} does not keep the weights it is given"
            except ServerFaultError as fault:
                endpoint.fault = str(fault)
            endpoint.faults += 1
        async with sampling.changed:
            endpoint.is_out = False
            logger.warning("SGLang server %s in use again, with the current weights", endpoint.url)
            sampling.changed.notify_all()

    async def _weight_label(self, endpoint: Endpoint) -> object:
        info = await self._http.ask(endpoint.url, "/model_info")
        return info.get("weight_version") if isinstance(info, dict) else None

    async def _watch_for_outage(self) -> None:
        clock, last_in_use = asyncio.get_running_loop().time, asyncio.get_running_loop().time()
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if not all(endpoint.is_out for endpoint in self.endpoints):
                last_in_use = clock()
            elif clock() - last_in_use > self._outage_timeout_s:
                faults = "; ".join(endpoint.fault for endpoint in self.endpoints)
                raise ServersGoneError(
                    f"no SGLang server has answered for rollout.sglang.outage_timeout_s ({self._outage_timeout_s:g} s): "
                    f"{faults}"
                )
