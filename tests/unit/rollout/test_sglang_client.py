"""What a client does where no server is: the rest of it is held against real ones in tests/rollout."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_gspo.launch import free_port
from megatron_gspo.rollout.sglang_client import ServersGoneError, SglangClient
from megatron_gspo.rollout.sglang_http import SglangHttp
from megatron_gspo.rollout.weight_sync_disk import DiskWeightSync
from megatron_gspo.types import OpenGroup, Prompt, SamplingSettings


@pytest.mark.parametrize(
    ("outage_timeout_s", "stops", "words"),
    [
        (3600.0, True, "no SGLang server answers, and the run was asked to stop"),
        (0.1, False, r"no SGLang server has answered for rollout.sglang.outage_timeout_s \(0.1 s\)"),
    ],
)
def test_servers_are_waited_for_until_the_limit_or_until_the_run_is_to_stop(
    outage_timeout_s: float, stops: bool, words: str, tmp_path: Path
):
    url, http = f"http://127.0.0.1:{free_port()}", SglangHttp("key", 5.0)
    client = SglangClient(
        http,
        [url],
        DiskWeightSync(tmp_path, "run"),
        requests_per_server=2,
        outage_timeout_s=outage_timeout_s,
        is_stop_requested=lambda: stops,
        routes=None,
    )
    groups = [OpenGroup.of(Prompt("test:0", (3,), "", ""), 4)]
    with pytest.raises(ServersGoneError, match=f"{words}: {re.escape(url)}.*Connect"):
        http.run(client.sample(groups, 1, SamplingSettings(4), version=0))
