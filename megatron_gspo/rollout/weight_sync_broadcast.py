"""Weights for SGLang servers through process groups: `weight_sync.WeightSync` without a file system.

In: every parameter once, under its Hugging Face name, and a version, on the process that owns the servers. Out: servers
that compute with them. The other processes of the run send nothing: their `send` waits until the owner has.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import torch

from megatron_gspo.rollout.sglang_http import ServerFaultError, SglangHttp, weight_label
from megatron_gspo.rollout.weight_sync_broadcaster import WeightBroadcaster

#: How long `send` waits for the owner of the servers before it reports a fault, after which it is called again.
WAIT_S = 10.0
LOOK_EVERY_S = 0.25


class BroadcastWeightSync:
    """Weights through process groups; see the module's description."""

    def __init__(self, run_id: str, broadcaster: WeightBroadcaster | None) -> None:
        """
        Args:
            run_id: unique among the runs that share the servers.
            broadcaster: of the process that owns the servers; None on the others.
        """
        self._run_id = run_id
        self._broadcaster = broadcaster

    def label(self, version: int) -> str:
        """See `WeightSync.label`."""
        return f"{self._run_id}.{version}"

    def publish(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Send the weights to every server as they come, and keep a copy in host memory for those that fail to get them."""
        assert self._broadcaster is not None, "the owner of the servers publishes"
        self._broadcaster.publish(weights, self.label(version))

    async def send(self, http: SglangHttp, url: str, version: int) -> bool:
        """See `WeightSync.send`. Right after `publish` it says at once what became of this server there."""
        fault = self._broadcaster.take_fault(url) if self._broadcaster is not None else None
        if fault is not None:
            raise fault
        for _ in range(round(WAIT_S / LOOK_EVERY_S)):
            if await weight_label(http, url) == self.label(version):
                return False
            await asyncio.sleep(LOOK_EVERY_S)
        raise ServerFaultError(f"{url} has not been given the weights of version {version} yet")

    def forget_before(self, version: int) -> None:
        """See `WeightSync.forget_before`: the copy of a version takes the place of the one before."""

    def take_resyncs(self) -> int:
        """See `WeightSync.take_resyncs`."""
        return self._broadcaster.take_resyncs() if self._broadcaster is not None else 0

    def close(self) -> None:
        """See `WeightSync.close`."""
        if self._broadcaster is not None:
            self._broadcaster.close()
