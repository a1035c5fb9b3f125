"""A process group beside torch's own: what is broadcast arrives, and a peer that is absent or gone ends it in time."""

from __future__ import annotations

import asyncio
import socket
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron_gspo.rollout.weight_sync_group import (
    BroadcastFailedError,
    BroadcastSilentError,
    UpdateGroup,
    address_towards,
)


class Peer(threading.Thread):
    """Rank 1: joins as a server does, and receives so many tensors of four bytes."""

    def __init__(self, group: UpdateGroup, num_broadcasts: int) -> None:
        super().__init__()
        self.received: list[list[int]] = []
        self._at, self._name, self._num_broadcasts = (group.address, group.port), group.name, num_broadcasts
        self._gone = threading.Event()
        self.start()

    def run(self) -> None:
        store: dist.Store = dist.TCPStore(*self._at, is_master=False, timeout=timedelta(seconds=10))
        for prefix in (self._name, f"{self._name}/", "cpu/"):
            store = dist.PrefixStore(prefix, store)
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._at[0])]
        group = dist.ProcessGroupGloo(store, 1, 2, options)
        for _ in range(self._num_broadcasts):
            data = torch.empty(4, dtype=torch.uint8)
            group.broadcast([data], dist.BroadcastOptions()).wait()
            self.received.append(data.tolist())
        self._gone.wait()

    def end(self) -> None:
        self._gone.set()
        self.join()


async def send(group: UpdateGroup, *tensors: torch.Tensor) -> None:
    await group.join()
    for tensor in tensors:
        await group.broadcast(tensor)


def test_what_is_broadcast_arrives_and_the_default_group_is_left_alone():
    group = UpdateGroup("arrives", "127.0.0.1", 2, "gloo", timeout_s=10.0)
    peer = Peer(group, num_broadcasts=2)
    was_initialized = dist.is_initialized()
    asyncio.run(send(group, torch.arange(4, dtype=torch.uint8), torch.arange(4, 8, dtype=torch.uint8)))
    assert dist.is_initialized() == was_initialized
    group.close()
    peer.end()
    assert peer.received == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_peer_that_never_joins_is_not_waited_for_beyond_the_limit():
    group = UpdateGroup("never joins", "127.0.0.1", 2, "gloo", timeout_s=0.5)
    with pytest.raises(BroadcastFailedError, match=r"did not join within 0\.5 s"):
        asyncio.run(group.join())
    group.close()


def test_a_peer_that_takes_nothing_is_told_from_one_that_is_gone():
    group = UpdateGroup("silent", "127.0.0.1", 2, "gloo", timeout_s=0.5)
    peer = Peer(group, num_broadcasts=0)
    with pytest.raises(BroadcastSilentError):
        asyncio.run(send(group, torch.zeros(1_000_000, dtype=torch.uint8)))
    group.close()
    peer.end()


def test_a_store_listens_on_the_address_it_is_given_and_no_other():
    group = UpdateGroup("address", "127.0.0.1", 2, "gloo", timeout_s=0.5)
    socket.create_connection(("127.0.0.1", group.port)).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", group.port))
    group.close()


def test_a_server_on_this_machine_is_reached_from_loopback():
    assert address_towards("127.0.0.1") == "127.0.0.1"
