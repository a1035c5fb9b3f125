"""The broadcast's stand-in for a server takes weights bit by bit, from those who have the key."""

import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file

from megatron_gspo.rollout.sglang_http import SglangHttp
from megatron_gspo.rollout.weight_sync_broadcaster import WeightBroadcaster
from tools.bench.receiver import Weights, serve

KEY = "the key"


@pytest.fixture
def url() -> Iterator[str]:
    server = serve(Weights(), KEY)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_the_trainer_broadcasts_is_what_the_receiver_saves(url: str, tmp_path: Path):
    weights = {
        str(number): torch.randn(3, 5).to(torch.bfloat16 if number % 2 else torch.float32) for number in range(6)
    }
    http = SglangHttp(KEY, 10.0)
    sender = WeightBroadcaster([url], http, backend="gloo", bucket_bytes=100, timeout_s=10.0, restart=None)
    sender.publish(weights.items(), "run.7")
    assert sender.take_fault(url) is None
    client = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, trust_env=False)
    assert client.get("/model_info").json() == {"weight_version": "run.7"}
    client.post("/save", json={"path": str(tmp_path / "weights")})
    found = load_file(tmp_path / "weights")
    assert found.keys() == weights.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in weights.items()
    )
    sender.close()


def test_others_and_what_a_server_does_not_know_are_refused(url: str):
    assert httpx.post(f"{url}/begin_weight_update", json={}, trust_env=False).status_code == 401
    headers = {"Authorization": f"Bearer {KEY}"}
    assert httpx.post(f"{url}/generate", json={}, headers=headers, trust_env=False).status_code == 404
