"""A process group of this process, as rank 0, with the ranks of SGLang servers, and nothing else in it.

In: an address that servers reach this process at. Out: a port to tell servers, and broadcasts to them that end within a
time limit. The group is made from torch's backend classes and is not registered with `torch.distributed`: the default group
and Megatron's are not touched, and a process without any can have it. Its store listens on that one address.

Servers join by `init_custom_process_group` (SGLang 0.5.21, srt/utils/common.py), whose prefixes of the store's keys,
and those of torch 2.13's `_new_process_group_helper`, are repeated here.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

POLL_S = 0.001


class BroadcastFailedError(Exception):
    """A broadcast did not come to its end. The group is of no further use."""


class BroadcastSilentError(BroadcastFailedError):
    """It did not within its time limit: a server is there, and takes nothing."""


class UpdateGroup:
    """Rank 0 of one group. `join` and `broadcast` are awaited; servers must be asked to take part at the same time."""

    def __init__(self, name: str, address: str, world_size: int, backend: str, timeout_s: float) -> None:
        """Open the group's store.

        Args:
            name: unique among the groups a server has been in.
            address: of this machine, as the servers reach it.
            world_size: this process and the servers' ranks.
            backend: "gloo", or "nccl" where each rank has a GPU of its own.
            timeout_s: how long a broadcast, or joining, may take.
        """
        self.name, self.address, self.world_size, self.backend = name, address, world_size, backend
        self._timeout_s = timeout_s
        # TCPStore would listen on every address of the machine; a socket that listens already is taken as it is.
        listening = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        self.port = int(listening.getsockname()[1])
        self._store = dist.TCPStore(
            address,
            self.port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listening.detach(),
        )
        self._group: Any = None

    async def join(self) -> None:
        """Wait until all ranks have joined.

        Raises:
            BroadcastFailedError: not within the time limit.
        """
        try:
            self._group = await asyncio.to_thread(self._connect)
        except RuntimeError as error:  # DistError and what gloo throws
            raise BroadcastFailedError(
                f"the servers did not join within {self._timeout_s:g} s: {_line(error)}"
            ) from error

    async def broadcast(self, data: torch.Tensor) -> None:
        """Send `data`, [bytes] uint8 in host memory, to all servers.

        Raises:
            BroadcastFailedError: a server is gone.
            BroadcastSilentError: it was not taken within the time limit.
        """
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        options.timeout = timedelta(seconds=self._timeout_s)
        started = time.monotonic()
        try:
            work = self._group.broadcast([data if self.backend == "gloo" else data.cuda()], options)
            while not work.is_completed():
                if time.monotonic() - started > self._timeout_s:
                    raise BroadcastSilentError(f"no end within {self._timeout_s:g} s")
                await asyncio.sleep(POLL_S)
            work.wait()
        except RuntimeError as error:
            kind = BroadcastSilentError if time.monotonic() - started >= self._timeout_s else BroadcastFailedError
            raise kind(_line(error)) from error

    def close(self) -> None:
        """Break the connections. Does not wait: gloo ends a broadcast that is under way only at its time limit."""
        if self._group is not None and self.backend == "nccl":
            self._group.abort()
        held: list[Any] = [self._group, self._store]
        self._group = self._store = None  # type: ignore[assignment]
        threading.Thread(target=held.clear, name="end of a weight update group", daemon=True).start()

    def _connect(self) -> Any:
        store = dist.PrefixStore(self.name, self._store)
        device = "cpu" if self.backend == "gloo" else "cuda"
        store = dist.PrefixStore(f"{device}/", dist.PrefixStore(f"{self.name}/", store))
        if self.backend == "gloo":
            options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._timeout = timedelta(seconds=self._timeout_s)
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=self.address)]
            return dist.ProcessGroupGloo(store, 0, self.world_size, options)
        nccl = dist.ProcessGroupNCCL.Options()
        # torch's watchdog ends this process when an operation takes longer; here it is given up earlier.
        nccl._timeout = timedelta(seconds=10 * self._timeout_s)
        return dist.ProcessGroupNCCL(store, 0, self.world_size, nccl)


def address_towards(host: str) -> str:
    """The address of this machine from which it reaches `host`. Nothing is sent."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
