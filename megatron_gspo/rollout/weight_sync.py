"""The policy's weights on their way to SGLang servers: what every way of sending them promises.

In: every parameter once, under its Hugging Face name, and a version. Out: servers that compute with them and say so: they
name the weights by a label of run and version, which every response carries.

`weight_sync_disk` writes files that servers load; `weight_sync_broadcast` sends them through process groups.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch

from megatron_gspo.rollout.sglang_http import SglangHttp


class WeightSync(Protocol):
    """A way for weights to reach servers."""

    def label(self, version: int) -> str:
        """What servers call the weights of `version`; of this run, so that another run's are never taken for them."""

    def publish(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Make the weights ready to be sent, or send them already; only the process that owns the servers does this.

        `weights` is consumed by the calling thread. A tensor stays as it is until this returns.

        Raises:
            RequestRefusedError: a server does not take these weights.
        """

    async def send(self, http: SglangHttp, url: str, version: int) -> bool:
        """Have one server take the published weights of `version`; on return it computes with them.

        Returns:
            Whether this call sent them; False where they were sent, and are counted, elsewhere.

        Raises:
            ServerFaultError: the server did not answer, or broke off.
            RequestRefusedError: it does not take these weights, and goes on with those it had.
        """

    def forget_before(self, version: int) -> None:
        """Weights older than `version` will not be sent again."""

    def take_resyncs(self) -> int:
        """Servers that were brought up to date outside `send`, since this was last asked."""

    def close(self) -> None:
        """Give back what sending takes. Closing twice is allowed."""
