"""A thread of the process that owns the servers, which sends them weights and keeps them up to date.

In: weights, once a version, from the thread that exports them. Out: servers that hold the newest. While a bucket is on
its way the next one is exported.

- Over gloo each server has a group of its own with this process. In a group of several the death of one left the others
  waiting for it (gloo cannot break off a broadcast), so each server gets the weights by itself, at its own pace, and a fault
  stays where it happened. Over NCCL, where a broadcast costs the sender the same however many receive it, all servers
  share a group; a fault in it is every server's, and each is then brought up to date by itself, over gloo.
- The buckets of the newest version stay in host memory: a trainer exports only when all of its ranks do, and a server that
  was started anew needs the weights before that. It is recognised by its label, and joins a new group.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from megatron_gspo.rollout.sglang_http import (
    RequestRefusedError,
    ServerFaultError,
    SglangHttp,
    SilentServerError,
    weight_label,
)
from megatron_gspo.rollout.sglang_memory import RELEASED
from megatron_gspo.rollout.weight_sync_buckets import Bucket, pack
from megatron_gspo.rollout.weight_sync_servers import ServerGroup
from megatron_gspo.types import UserError

logger = logging.getLogger(__name__)
T = TypeVar("T")

LOOK_EVERY_S = 1.0
LOOK_TIMEOUT_S = 5.0
POLL_S = 0.002


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
        self._groups: dict[tuple[str, ...], ServerGroup] = {}
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
        self._run(self._leave_all()).result()
        self._closed = True  # only now: the thread, whose loop has just done this, ends when it sees it
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

        self._loop.run_until_complete(look_after())
        self._loop.close()

    async def _send_to_all(self, outgoing: _Outgoing) -> RequestRefusedError | None:
        """Send what comes to all servers, and let the lock go that `publish` took. Returns a server's refusal."""
        together = [self._urls] if self._backend == "nccl" else [(url,) for url in self._urls]
        try:
            results = await asyncio.gather(
                *(self._send_or_fault(urls, self._backend, outgoing) for urls in together), return_exceptions=True
            )
            refusal = next((result for result in results if isinstance(result, RequestRefusedError)), None)
            if refusal is not None:
                outgoing.is_whole = False  # nobody is to be brought up to date with them
            self._faults = {}
            for urls, result in zip(together, results, strict=True):
                if isinstance(result, ServerFaultError):
                    self._faults |= dict.fromkeys(urls, result)
                elif result is not None and not isinstance(result, RequestRefusedError):
                    raise result
        finally:
            self._busy.release()
        return refusal

    async def _bring_up_to_date(self) -> None:
        outgoing = self._outgoing
        if outgoing is None or not outgoing.is_whole or self._closed:
            return
        behind = [url for url in self._urls if await self._is_behind(url, outgoing.label)]
        for urls in [urls for urls in self._groups if set(urls) & set(behind)]:
            self._drop(urls)
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
                found = await weight_label(self._http, url)
                if found == label or str(found).endswith(RELEASED):
                    return False
                await self._http.ask(url, "/health")  # last, because a server at rest samples a token for it
        except (ServerFaultError, TimeoutError, UserError):  # whoever asks it for something says so
            return False
        return True

    async def _send_or_fault(self, urls: tuple[str, ...], backend: str, outgoing: _Outgoing) -> None:
        """Send all buckets to the servers of one group.

        Raises:
            ServerFaultError: they did not all get them; the group is given up, and a silent server restarted.
            RequestRefusedError: one does not take these weights.
        """
        try:
            if urls not in self._groups:
                self._groups[urls] = await ServerGroup.form(self._http, urls, backend, self._timeout_s)
            await self._groups[urls].send(outgoing, outgoing.label)
        except (ServerFaultError, RequestRefusedError) as fault:
            self._drop(urls)
            if isinstance(fault, SilentServerError) and self._restart is not None:
                for url in urls:
                    self._restart(url)
            raise

    def _drop(self, urls: tuple[str, ...]) -> None:
        if urls in self._groups:
            self._groups.pop(urls).close()

    async def _leave_all(self) -> None:
        """End the groups at the servers, then here."""
        async with self._busy:
            await asyncio.gather(*(group.leave() for group in self._groups.values()))
            self._groups.clear()
