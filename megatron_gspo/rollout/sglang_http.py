"""HTTP to SGLang servers: the job's key, JSON both ways, and what can go wrong told apart.

In: a server's URL, an endpoint of SGLang 0.5.21, a body. Out: the decoded answer. Proxies that the environment names are
not used: the servers are this machine or its neighbours.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import httpx

from megatron_gspo.types import TrainingFailedError, UserError

T = TypeVar("T")

CONNECT_TIMEOUT_S = 10.0
#: What a server may take to say how it is; SGLang's `/health` answers after 20 s at the latest.
LOOK_TIMEOUT_S = 30.0
SHOWN_CHARACTERS = 300


class ServerFaultError(Exception):
    """A server failed over a request that may succeed with another server, or with the same one later."""


class SilentServerError(ServerFaultError):
    """A server is there, and neither answers nor breaks off."""


class RequestRefusedError(TrainingFailedError):
    """A server understood a request and refused it; it would refuse it again."""


class SglangHttp:
    """A client for one job. Requests are made inside `open`."""

    def __init__(self, key: str, timeout_s: float) -> None:
        """`timeout_s`: how long a server may be silent while it works on a request."""
        self._headers = {"Authorization": f"Bearer {key}"}
        self._timeout_s = timeout_s
        self._client: httpx.AsyncClient | None = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Keep connections for the duration of the block; how many are in use is for the caller to bound."""
        async with httpx.AsyncClient(
            headers=self._headers,
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
            follow_redirects=False,
        ) as self._client:
            yield
        self._client = None

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work`, which makes requests, to its end."""

        async def in_session() -> T:
            async with self.open():
                return await work

        return asyncio.run(in_session())

    async def ask(
        self, url: str, endpoint: str, body: dict[str, Any] | None = None, *, timeout_s: float | None = None
    ) -> Any:
        """What the server at `url` answers to a GET, or to a POST of `body`; `timeout_s` where it is to answer sooner.

        Raises:
            ServerFaultError: refused or broken connection, silence (SilentServerError), status 429 or above 499, or an
                answer that is not JSON.
            RequestRefusedError: any other status that is not 200.
            UserError: the server does not take the key.
        """
        response = await self._request(url, endpoint, body, timeout_s)
        if not response.content:
            return None  # the health endpoint says all by its status
        try:
            return response.json()
        except ValueError as error:
            raise ServerFaultError(
                f"{url}{endpoint} answered what is not JSON: {response.text[:SHOWN_CHARACTERS]}"
            ) from error

    async def tell(self, url: str, endpoint: str, body: dict[str, Any]) -> None:
        """POST `body` to an endpoint that answers in words, of which the status says all. Raises what `ask` does."""
        await self._request(url, endpoint, body, None)

    async def _request(
        self, url: str, endpoint: str, body: dict[str, Any] | None, timeout_s: float | None
    ) -> httpx.Response:
        assert self._client is not None, "requests are made inside open()"
        timeout = httpx.Timeout(timeout_s or self._timeout_s, connect=CONNECT_TIMEOUT_S)
        try:
            if body is None:
                response = await self._client.get(url + endpoint, timeout=timeout)
            else:
                response = await self._client.post(url + endpoint, json=body, timeout=timeout)
        except httpx.RequestError as error:
            kind = SilentServerError if isinstance(error, httpx.ReadTimeout) else ServerFaultError
            raise kind(f"{url}{endpoint}: {type(error).__name__} {error}".rstrip()) from error
        status = response.status_code
        said = f"{url}{endpoint} answered {status}: {response.text[:SHOWN_CHARACTERS]}"
        if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise UserError(
                f"rollout.sglang.key_file: the SGLang server at {url} does not take the key (status {status}); accepted: "
                "a file with the key that the server was started with"
            )
        if status == httpx.codes.TOO_MANY_REQUESTS or status >= httpx.codes.INTERNAL_SERVER_ERROR:
            raise ServerFaultError(said)
        if status != httpx.codes.OK:
            raise RequestRefusedError(said)
        return response


async def weight_label(http: SglangHttp, url: str) -> object:
    """What a server calls the weights it holds. What it is asked here never takes it long."""
    info = await http.ask(url, "/model_info", timeout_s=LOOK_TIMEOUT_S)
    return info.get("weight_version") if isinstance(info, dict) else None
