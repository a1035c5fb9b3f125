"""What one group of servers is asked for while it takes weights: SGLang 0.5.21's endpoints, in their order.

In: buckets, one after the other. Out: servers that compute with them and name them by their label.

    /init_weights_update_group                              once a group
    /begin_weight_update                                    each version
      /update_weights_from_distributed                      each bucket, beside a broadcast
    /end_weight_update  /flush_cache  /update_weight_version
    /destroy_weights_update_group                           at the end

A server that has parts of two versions says so: it is given a label that no version has before the first bucket, and the
version's after the last.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterable, Coroutine, Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

from megatron_gspo.rollout.sglang_http import RequestRefusedError, ServerFaultError, SglangHttp, SilentServerError
from megatron_gspo.rollout.weight_sync_buckets import Bucket
from megatron_gspo.rollout.weight_sync_group import (
    BroadcastFailedError,
    BroadcastSilentError,
    UpdateGroup,
    address_towards,
)

INCOMPLETE = ".incomplete"
#: What the side that has not failed is given to say what it knows.
LAST_WORDS_S = 1.0

_numbers = itertools.count()


class ServerGroup:
    """Servers that take weights through one process group."""

    def __init__(self, http: SglangHttp, urls: Sequence[str], group: UpdateGroup, timeout_s: float) -> None:
        """For `form`, which makes one that servers have joined."""
        self.urls = tuple(urls)
        self._http, self._group, self._timeout_s = http, group, timeout_s

    @classmethod
    async def form(cls, http: SglangHttp, urls: Sequence[str], backend: str, timeout_s: float) -> ServerGroup:
        """Join servers, each of which brings as many ranks as its model is spread over.

        Raises:
            ServerFaultError: they did not all join within the time limit.
        """
        infos = [await http.ask(url, "/server_info") for url in urls]
        sizes = [int(info["tp_size"]) for info in infos]
        name = f"megatron_gspo_{os.getpid()}_{next(_numbers)}"
        address = address_towards(urlsplit(urls[0]).hostname or "")
        group = cls(http, urls, UpdateGroup(name, address, 1 + sum(sizes), backend, timeout_s), timeout_s)
        try:
            await group._join(sizes)
        except (ServerFaultError, RequestRefusedError):
            group.close()
            raise
        return group

    async def send(self, buckets: AsyncIterable[Bucket], label: str) -> None:
        """Send all weights of a version. Cached keys and values, which the former weights made, are dropped.

        Raises:
            ServerFaultError: they were not all taken; SilentServerError where a server did not even break off.
            RequestRefusedError: a server does not take these weights.
        """
        await asyncio.gather(*(self._begin(url, label) for url in self.urls))
        async for bucket in buckets:
            await self._send_bucket(bucket, label)
        await asyncio.gather(*(self._end(url, label) for url in self.urls))

    async def leave(self) -> None:
        """End the group at the servers, as far as they answer, and here."""
        body = {"group_name": self._group.name}
        requests = (self._http.ask(url, "/destroy_weights_update_group", body) for url in self.urls)
        await asyncio.wait([asyncio.create_task(_outcome(request)) for request in requests], timeout=LAST_WORDS_S)
        self.close()

    def close(self) -> None:
        """Break the group off. Its servers keep a broken one under its name, which costs them nothing."""
        self._group.close()

    async def _join(self, sizes: Sequence[int]) -> None:
        asked = [
            self._http.ask(
                url,
                "/init_weights_update_group",
                {
                    "master_address": self._group.address,
                    "master_port": self._group.port,
                    "rank_offset": first_rank,
                    "world_size": self._group.world_size,
                    "group_name": self._group.name,
                    "backend": self._group.backend,
                },
            )
            for url, first_rank in zip(self.urls, itertools.accumulate(sizes[:-1], initial=1), strict=True)
        ]
        await self._together(self._group.join(), asked)

    async def _send_bucket(self, bucket: Bucket, label: str) -> None:
        body = {
            "names": bucket.names,
            "dtypes": bucket.dtypes,
            "shapes": bucket.shapes,
            "group_name": self._group.name,
            "load_format": "flattened_bucket",
            "weight_version": label + INCOMPLETE,
            "flush_cache": False,  # once, at the end
        }
        asked = [self._http.ask(url, "/update_weights_from_distributed", body) for url in self.urls]
        await self._together(self._group.broadcast(bucket.data), asked)

    async def _together(self, own: Coroutine[Any, Any, None], asked: Iterable[Coroutine[Any, Any, Any]]) -> None:
        """Do this process's part of a collective while servers are asked to do theirs; whichever fails first ends it."""
        doing, answering = asyncio.create_task(own), [asyncio.create_task(request) for request in asked]
        _, pending = await asyncio.wait({doing, *answering}, return_when=asyncio.FIRST_EXCEPTION)
        if pending:  # one has failed; what a server says of it comes right after, and tells more
            _, pending = await asyncio.wait(pending, timeout=LAST_WORDS_S)
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
            raise kind(f"{', '.join(self.urls)}: weights could not be sent: {failure}") from failure
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
        """Finish an update."""
        await self._http.ask(url, "/end_weight_update", {})
        await self._http.tell(url, f"/flush_cache?timeout={self._timeout_s:g}", {})
        await self._name(url, label)

    async def _name(self, url: str, label: str) -> None:
        await self._http.ask(url, "/update_weight_version", {"new_version": label, "abort_all_requests": False})


async def _outcome(request: Coroutine[Any, Any, Any]) -> None:
    """Make a request whose failure changes nothing."""
    await asyncio.gather(request, return_exceptions=True)
