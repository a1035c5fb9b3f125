"""A thread of the process that owns the servers, which sends them weights and keeps them up to date.

In: weights, once a version, from the thread that exports them. Out: servers that hold the newest. While a bucket is on
its way the next one is exported.

- Over gloo each server has a group of its own with this process. In a group of several the death of one left the others
  waiting for it (gloo cannot break off a broadcast), so each server gets the weights by itself, at its own pace, and a fault
  stays where it happened. Over NCCL, where a broadcast costs the sender the same however many receive it, all servers
  share a group; a fault in it is every server's, and each is then brought up to date by itself, over gloo.
- The buckets of the newest version stay in host memory: a trainer exports only when all of its ranks do, and a server that
  was started anew needs the weights before that. It is recognised by its label, and joins a new group.
- A server that has parts of two versions says so: its label is set to one that no version has before the first bucket,
  and to the version's after the last.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch

from megatron_gspo.rollout.sglang_http import RequestRefusedError, ServerFaultError, SglangHttp
from megatron_gspo.rollout.sglang_memory import RELEASED
from megatron_gspo.rollout.weight_sync_buckets import Bucket, pack
from megatron_gspo.rollout.weight_sync_group import (
    BroadcastFailedError,
    BroadcastSilentError,
    UpdateGroup,
    address_towards,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")

LOOK_EVERY_S = 1.0
LOOK_TIMEOUT_S = 5.0
POLL_S = 0.002
INCOMPLETE = ".incomplete"


class SilentServerError(ServerFaultError):
    """A server neither takes weights nor breaks off."""


@dataclass
class _Outgoing:
    """One version's buckets: appended by the exporting thread, read by any number of senders from the first on."""

    label: str
    buckets: list[Bucket] = field(default_factory=list)
    is_whole: bool = False
    is_given_up: bool = False

    async def __aiter__(self) -> AsyncIterator[Bucket]:
        for position in itertools.count():
            while position >= len(self.buckets):
                if self.is_given_up:
                    raise ServerFaultError("the weights were not exported to their end")
                if self.is_whole:
                    return
                await asyncio.sleep(POLL_S)
            yield self.buckets[position]


class WeightBroadcaster:
    """Sends weights to servers from a thread of its own."""

    def __init__(
        self,
        urls: Sequence[str],
        http: SglangHttp,
        *,
        backend: str,
        bucket_bytes: int,
        timeout_s: float,
        restart: Callable[[str], None] | None,
    ) -> None:
        """
        Args:
            urls: the servers.
            http: with the servers' key; for this thread alone.
            backend: "nccl" where this process and the servers have GPUs of their own, else "gloo".
            bucket_bytes: see `pack`.
            timeout_s: how long a server may take to join a group, or over one bucket.
            restart: ends a server that is silent, so that it is started again; None where others started them.
        """
        self._urls, self._http, self._backend = tuple(urls), http, backend
        self._bucket_bytes, self._timeout_s, self._restart = bucket_bytes, timeout_s, restart
        self._groups: dict[tuple[str, ...], UpdateGroup] = {}
        self._outgoing: _Outgoing | None = None
        self._faults: dict[str, ServerFaultError] = {}
        self._resyncs = 0
        self._busy = asyncio.Lock()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="weights to SGLang servers", daemon=True)
        self._thread.start()

    def publish(self, weights: Iterable[tuple[str, torch.Tensor]], label: str) -> None:
        """Send weights to all servers while they come. Servers that did not get them have a fault to take.

        Raises:
            RequestRefusedError: a server does not take these weights.
        """
        self._run(self._busy.acquire()).result()  # a server that is being brought up to date has the buckets in use
        spare = [bucket.data for bucket in self._outgoing.buckets] if self._outgoing is not None else []
        self._outgoing = outgoing = _Outgoing(label)
        sent = self._run(self._send_to_all(outgoing))
        try:
            for bucket in pack(weights, self._bucket_bytes, spare):
                outgoing.buckets.append(bucket)
            outgoing.is_whole = True
        finally:
            outgoing.is_given_up = not outgoing.is_whole
            refusal = sent.result()
        if refusal is not None:
            raise refusal

    def take_fault(self, url: str) -> ServerFaultError | None:
        """Why a server did not get what was published last; once."""
        return self._faults.pop(url, None)

    def take_resyncs(self) -> int:
        """Servers that were brought up to date since this was last asked."""
        taken, self._resyncs = self._resyncs, 0
        return taken

    def close(self) -> None:
        """End the groups, at the servers too, and the thread. Closing twice is allowed."""
        if self._closed:
            return
        self._closed = True
        self._run(self._leave_all()).result()
        self._thread.join()

    def _run(self, work: Coroutine[Any, Any, T]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _serve(self) -> None:
        """The thread: look after the servers until closed."""

        async def look_after() -> None:
            async with self._http.open():
                while not self._closed:
                    await asyncio.sleep(LOOK_EVERY_S)
                    async with self._busy:
                        await self._bring_up_to_date()

        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(look_after())
        self._loop.close()

    async def _send_to_all(self, outgoing: _Outgoing) -> RequestRefusedError | None:
        """Send what comes to all servers, and let the lock go that `publish` took."""
        together = [self._urls] if self._backend == "nccl" else [(url,) for url in self._urls]
        try:
            results = await asyncio.gather(
                *(self._send_or_fault(urls, self._backend, outgoing) for urls in together), return_exceptions=True
            )
        finally:
            self._busy.release()
        self._faults = {}
        for urls, result in zip(together, results, strict=True):
            if isinstance(result, RequestRefusedError):
                return result
            if isinstance(result, ServerFaultError):
                self._faults |= dict.fromkeys(urls, result)
            elif result is not None:
                raise result
        return None

    async def _bring_up_to_date(self) -> None:
        outgoing = self._outgoing
        if outgoing is None or not outgoing.is_whole or self._closed:
            return
        behind = [url for url in self._urls if await self._is_behind(url, outgoing.label)]
        for urls, group in list(self._groups.items()):
            if set(urls) & set(behind):
                self._drop(urls, group)
        results = await asyncio.gather(
            *(self._send_or_fault((url,), "gloo", outgoing) for url in behind), return_exceptions=True
        )
        for url, result in zip(behind, results, strict=True):
            if result is None:
                self._resyncs += 1
                logger.warning("SGLang server %s brought up to date with %s", url, outgoing.label)
            else:
                logger.warning("SGLang server %s is not brought up to date: %s", url, result)

    async def _is_behind(self, url: str, label: str) -> bool:
        """Whether a server answers, and holds other weights; one whose memory is released waits for the next ones."""
        try:
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                await self._http.ask(url, "/health")
                found = await weight_label(self._http, url)
        except (ServerFaultError, TimeoutError):
            return False
        return found != label and not str(found).endswith(RELEASED)

    async def _send_or_fault(self, urls: tuple[str, ...], backend: str, outgoing: _Outgoing) -> None:
        """Send all buckets to the servers of one group.

        Raises:
            ServerFaultError: they did not all get them; the group is given up, and a silent server restarted.
            RequestRefusedError: one does not take these weights.
        """
        try:
            group = self._groups.get(urls)
            if group is None:
                group = await self._form(urls, backend)
            await asyncio.gather(*(self._begin(url, outgoing.label) for url in urls))
            async for bucket in outgoing:
                await self._send_bucket(group, urls, bucket, outgoing.label)
            await asyncio.gather(*(self._end(url, outgoing.label) for url in urls))
        except (ServerFaultError, RequestRefusedError) as fault:
            if urls in self._groups:
                self._drop(urls, self._groups[urls])
            if isinstance(fault, SilentServerError) and self._restart is not None:
                for url in urls:
                    self._restart(url)
            raise

    async def _form(self, urls: tuple[str, ...], backend: str) -> UpdateGroup:
        """A new group with servers, each of which brings as many ranks as its model is spread over."""
        infos = [await self._http.ask(url, "/server_info") for url in urls]
        sizes = [int(info["tp_size"]) for info in infos]
        address = address_towards(urlsplit(urls[0]).hostname or "")
        name = f"megatron_gspo_{threading.get_ident()}_{next(_GROUP_NUMBERS)}"
        group = UpdateGroup(name, address, 1 + sum(sizes), backend, self._timeout_s)
        self._groups[urls] = group
        first_ranks = itertools.accumulate(sizes[:-1], initial=1)
        bodies = [
            {
                "master_address": group.address,
                "master_port": group.port,
                "rank_offset": first_rank,
                "world_size": group.world_size,
                "group_name": group.name,
                "backend": backend,
            }
            for first_rank in first_ranks
        ]
        asked = [
            self._http.ask(url, "/init_weights_update_group", body) for url, body in zip(urls, bodies, strict=True)
        ]
        await self._together(urls, group.join(), asked)
        return group

    async def _send_bucket(self, group: UpdateGroup, urls: tuple[str, ...], bucket: Bucket, label: str) -> None:
        body = {
            "names": bucket.names,
            "dtypes": bucket.dtypes,
            "shapes": bucket.shapes,
            "group_name": group.name,
            "load_format": "flattened_bucket",
            "weight_version": label + INCOMPLETE,
            "flush_cache": False,  # once, at the end
        }
        asked = [self._http.ask(url, "/update_weights_from_distributed", body) for url in urls]
        await self._together(urls, group.broadcast(bucket.data), asked)

    async def _together(
        self, urls: tuple[str, ...], own: Coroutine[Any, Any, None], asked: Iterable[Coroutine[Any, Any, Any]]
    ) -> None:
        """Do this process's part of a collective while servers are asked to do theirs; whichever fails first ends it."""
        doing, answering = asyncio.create_task(own), [asyncio.create_task(request) for request in asked]
        _, pending = await asyncio.wait({doing, *answering}, return_when=asyncio.FIRST_EXCEPTION)
        if pending:  # one has failed; what a server says of it comes right after, and tells more
            _, pending = await asyncio.wait(pending, timeout=1.0)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        failures = [task.exception() for task in (*answering, doing) if not task.cancelled() and task.exception()]
        if not failures:
            return
        failure, took_part = failures[0], not doing.cancelled() and doing.exception() is None
        if isinstance(failure, RequestRefusedError) and not took_part:
            raise ServerFaultError(str(failure)) from failure  # it speaks of the group, not of the weights
        if isinstance(failure, BroadcastFailedError):
            kind = SilentServerError if isinstance(failure, BroadcastSilentError) else ServerFaultError
            raise kind(f"{', '.join(urls)}: weights could not be sent: {failure}") from failure
        assert failure is not None, "only exceptions are kept"
        raise failure

    async def _begin(self, url: str, label: str) -> None:
        """Open an update; one that an earlier fault left open is ended first."""
        try:
            await self._http.ask(url, "/begin_weight_update", {})
        except RequestRefusedError:
            await self._http.ask(url, "/end_weight_update", {})
            await self._http.ask(url, "/begin_weight_update", {})
        await self._name(url, label + INCOMPLETE)

    async def _end(self, url: str, label: str) -> None:
        """Finish an update. Cached keys and values, which the former weights made, are dropped with them."""
        await self._http.ask(url, "/end_weight_update", {})
        await self._http.ask(url, f"/flush_cache?timeout={self._timeout_s:g}", {})
        await self._name(url, label)

    async def _name(self, url: str, label: str) -> None:
        await self._http.ask(url, "/update_weight_version", {"new_version": label, "abort_all_requests": False})

    def _drop(self, urls: tuple[str, ...], group: UpdateGroup) -> None:
        """Give a group up. Its servers keep a broken one under its name, which costs them nothing."""
        group.close()
        del self._groups[urls]

    async def _leave_all(self) -> None:
        """End the groups at the servers, then here."""
        async with self._busy:
            for urls, group in list(self._groups.items()):
                leave = {"group_name": group.name}
                requests = [self._http.ask(url, "/destroy_weights_update_group", leave) for url in urls]
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_TIMEOUT_S):
                        await asyncio.gather(*requests, return_exceptions=True)
                self._drop(urls, group)


async def weight_label(http: SglangHttp, url: str) -> object:
    """What a server calls the weights it holds."""
    info = await http.ask(url, "/model_info")
    return info.get("weight_version") if isinstance(info, dict) else None


_GROUP_NUMBERS = itertools.count()
