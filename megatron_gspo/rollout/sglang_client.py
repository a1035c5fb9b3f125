"""Many responses in flight over several SGLang servers, whatever happens to some of the servers.

In: groups of responses, begun or not, settings, the version of the current weights. Out: the groups, with as many of them
complete as were asked for, each response sampled exactly once.

Every server has workers, as many as responses it samples at one time; a worker takes the next response that is still to
be sampled, so a faster server takes more of them and no queue forms at a server. A fault takes the server out: its
responses go back to be sampled by any server, and it comes in again once it answers, after pauses that double, and only
with the current weights, which it is given if it has others.

Once enough groups are complete, requests in flight are called off, one by one, since servers may work for other clients
too: `/abort_request` has a server answer with the tokens so far. The rest of such a response is asked for later by its
prompt and those tokens. SGLang's `/pause_generation` with mode `retract` would keep requests open in the server over a
change of weights instead. But a server reads a response's routes from its cache once the response has ended (0.5.21,
srt/state_capturer/base.py, `get_topk`), and by then the new weights have filled that anew: the routes that older tokens
were sampled with, which Routing Replay needs, are gone. A server that fails takes the tokens with it, too, and it does not
release its memory while requests are open. Either way the prefix is computed once more.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_gspo.rollout.engine import EngineGoneError
from megatron_gspo.rollout.open_groups import Slot, filled, open_slots
from megatron_gspo.rollout.sglang_http import LOOK_TIMEOUT_S, ServerFaultError, SglangHttp, weight_label
from megatron_gspo.rollout.sglang_response import (
    Expected,
    NothingSampledError,
    ResponseSchemaError,
    RoutesShape,
    StaleWeightsError,
    decode_answer,
    request_body,
)
from megatron_gspo.rollout.weight_sync import WeightSync
from megatron_gspo.types import OpenGroup, Response, SamplingSettings, TrainingFailedError

logger = logging.getLogger(__name__)

#: A response that this many servers failed over, one after the other, is what makes them fail.
MAX_ATTEMPTS = 6
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0
LOOK_EVERY_S = 0.5
LOOK_FOR_INTERRUPT_EVERY_S = 0.05
CALL_OFF_EVERY_S, LONGEST_CALL_OFF_S = 0.1, 30.0


class ServersGoneError(EngineGoneError):
    """No server has answered for longer than the recipe allows, or none answers a run that was asked to stop."""


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
    """One response to be sampled, or to be sampled to its end."""

    slot: Slot
    faults: int = 0


@dataclass
class _Sampling:
    """One call's work."""

    jobs: deque[_Job]
    settings: SamplingSettings
    version: int
    unfinished: Counter[int]  # responses that each group lacks
    num_wanted: int  # groups that are still to be completed
    sampled: dict[tuple[int, int], tuple[Slot, Response]] = field(default_factory=dict)  # by group and place in it
    in_flight: dict[str, str] = field(default_factory=dict)  # request id -> server
    is_closing: bool = False
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)  # what stands above, or an endpoint's is_out
    returns: set[asyncio.Task[None]] = field(default_factory=set)

    def add(self, slot: Slot, response: Response) -> None:
        """Take a response, at its end or as far as it has come."""
        assert (slot.group, slot.response) not in self.sampled, "a response is sampled once"
        self.sampled[slot.group, slot.response] = (slot, response)
        if response.finish_reason != "abort":
            self.unfinished[slot.group] -= 1
            self.num_wanted -= self.unfinished[slot.group] == 0


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
        is_stop_requested: Callable[[], bool],
        routes: RoutesShape | None,
    ) -> None:
        """
        Args:
            http: with the servers' key.
            urls: the servers.
            sync: how a server that has other weights gets the current ones.
            requests_per_server: responses of this client that a server samples at one time.
            outage_timeout_s: how long to wait while no server answers.
            is_stop_requested: asked while none does; what has been asked to stop waits no longer.
            routes: what routed experts look like; None where they are not asked for.
        """
        self.endpoints = [Endpoint(url) for url in urls]
        self.counts: Counter[str] = Counter()  # what happened, by metric name
        self._http = http
        self._sync = sync
        self._requests_per_server = requests_per_server
        self._outage_timeout_s, self._is_stop_requested = outage_timeout_s, is_stop_requested
        self._routes = routes

    async def sample(
        self,
        groups: Sequence[OpenGroup],
        num_complete: int,
        settings: SamplingSettings,
        version: int,
        interrupt: threading.Event | None = None,
    ) -> list[OpenGroup]:
        """`RolloutEngine.generate_until`, with the weights of `version`.

        Raises:
            ServersGoneError: no server has answered for the outage's time limit, or since a stop was asked for.
            ResponseSchemaError: an answer is not what this program reads.
            TrainingFailedError: a request is refused, or fails with every server.
            UserError: a server does not take the key.
        """
        slots = open_slots(groups)
        num_wanted = num_complete - sum(group.is_complete for group in groups)
        if num_wanted <= 0:
            return list(groups)
        jobs, unfinished = deque(_Job(slot) for slot in slots), Counter(slot.group for slot in slots)
        sampling = _Sampling(jobs, settings, version, unfinished, num_wanted)
        try:
            async with asyncio.TaskGroup() as tasks:
                # Workers start in this order, so servers' loads are even from the first response on.
                workers = [
                    tasks.create_task(self._work(endpoint, sampling, tasks))
                    for _ in range(min(self._requests_per_server, len(slots)))
                    for endpoint in self.endpoints
                ]
                for endpoint in self.endpoints:
                    if endpoint.is_out:
                        self._bring_back(endpoint, sampling, tasks)
                workers.append(tasks.create_task(self._watch_for_outage()))
                if interrupt is not None:
                    workers.append(tasks.create_task(_close_when_set(interrupt, sampling)))
                async with sampling.changed:
                    await sampling.changed.wait_for(lambda: sampling.num_wanted <= 0 or sampling.is_closing)
                    sampling.is_closing = True
                await self._call_off(sampling)
                for task in (*workers, *sampling.returns):
                    task.cancel()
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from failed
        return filled(groups, list(sampling.sampled.values()))

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
                await sampling.changed.wait_for(
                    lambda: bool(sampling.jobs) and not endpoint.is_out and not sampling.is_closing
                )
                job = sampling.jobs.popleft()
            try:
                response = await self._sample(endpoint, job, sampling)
            except NothingSampledError:
                continue
            except (ServerFaultError, StaleWeightsError) as fault:
                stale = isinstance(fault, StaleWeightsError)
                self.counts["rollout/num_stale_responses" if stale else "rollout/num_retries"] += 1
                job.faults += not stale
                if job.faults >= MAX_ATTEMPTS:
                    raise TrainingFailedError(
                        f"a response to {job.slot.prompt.id} failed {MAX_ATTEMPTS} times, the last: {fault}"
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
                sampling.add(job.slot, response)
                if sampling.num_wanted <= 0:
                    sampling.changed.notify_all()

    async def _sample(self, endpoint: Endpoint, job: _Job, sampling: _Sampling) -> Response:
        prompt, so_far, settings = job.slot.prompt, job.slot.so_far, sampling.settings
        request_id, wants_routes = secrets.token_hex(16), self._routes is not None
        body = request_body(prompt, settings, return_routed_experts=wants_routes, so_far=so_far, request_id=request_id)
        sampling.in_flight[request_id] = endpoint.url
        try:
            answer = await self._http.ask(endpoint.url, "/generate", body)
        finally:
            del sampling.in_flight[request_id]
        expected = Expected(self._sync.label(sampling.version), sampling.version, self._routes, endpoint.sglang_version)
        return decode_answer(answer, prompt, settings, expected, so_far=so_far, is_called_off=sampling.is_closing)

    async def _call_off(self, sampling: _Sampling) -> None:
        """Have servers answer what is in flight with the tokens so far, and wait until they have.

        A request that is called off before the server knows of it runs to its end; so does one whose server no longer
        answers, and after a while that is not waited for: the response stays as it was before.
        """
        clock = asyncio.get_running_loop().time
        give_up_at = clock() + LONGEST_CALL_OFF_S
        while sampling.in_flight and clock() < give_up_at:
            for outcome in await asyncio.gather(
                *(self._http.ask(url, "/abort_request", {"rid": rid}) for rid, url in sampling.in_flight.items()),
                return_exceptions=True,
            ):
                if isinstance(outcome, BaseException) and not isinstance(outcome, ServerFaultError):
                    raise outcome
            await asyncio.sleep(CALL_OFF_EVERY_S)
        if sampling.in_flight:
            logger.warning("%d requests were called off and not answered", len(sampling.in_flight))

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
                await self._http.ask(endpoint.url, "/health", timeout_s=LOOK_TIMEOUT_S)
                if await weight_label(self._http, endpoint.url) != label:
                    self.counts["rollout/num_resyncs"] += await self._sync.send(
                        self._http, endpoint.url, sampling.version
                    )
                if await weight_label(self._http, endpoint.url) == label:
                    break
                endpoint.fault = f"{endpoint.url} does not keep the weights it is given"
            except ServerFaultError as fault:
                endpoint.fault = str(fault)
            endpoint.faults += 1
        async with sampling.changed:
            endpoint.is_out = False
            logger.warning("SGLang server %s in use again, with the current weights", endpoint.url)
            sampling.changed.notify_all()

    async def _watch_for_outage(self) -> None:
        clock, last_in_use = asyncio.get_running_loop().time, asyncio.get_running_loop().time()
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if not all(endpoint.is_out for endpoint in self.endpoints):
                last_in_use = clock()
                continue
            faults = "; ".join(endpoint.fault for endpoint in self.endpoints)
            if self._is_stop_requested():
                raise ServersGoneError(f"no SGLang server answers, and the run was asked to stop: {faults}")
            if clock() - last_in_use > self._outage_timeout_s:
                raise ServersGoneError(
                    f"no SGLang server has answered for rollout.sglang.outage_timeout_s ({self._outage_timeout_s:g} s): "
                    f"{faults}"
                )


async def _close_when_set(interrupt: threading.Event, sampling: _Sampling) -> None:
    while not interrupt.is_set():
        await asyncio.sleep(LOOK_FOR_INTERRUPT_EVERY_S)
    async with sampling.changed:
        sampling.is_closing = True
        sampling.changed.notify_all()
