"""Takes weights as an SGLang server does, and nothing else: `python -m tools.bench.receiver`, started by `Receiver`.

In: SGLang 0.5.21's requests for a weight update on a loopback port, and buckets through a gloo group. Out: the weights,
on request as a file of safetensors. It joins and receives as a server does, into new memory a bucket, but loads nothing
into a model, so that what is measured is the sender's way. It receives plain broadcasts too, for the probe beside it.
"""

from __future__ import annotations

import http.client
import json
import math
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_gspo.rollout.weight_sync_buckets import Bucket

TIMEOUT_S = 60.0


class Receiver:
    """A receiver in a process of its own, and the way to ask it for something."""

    def __init__(self) -> None:
        self.key = secrets.token_hex(16)
        command = [sys.executable, "-m", "tools.bench.receiver"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(self.key + "\n")
        self._process.stdin.flush()
        port = self._process.stdout.readline().strip()
        assert port, "the receiver ended; why is on the terminal"
        self.url = f"http://127.0.0.1:{port}"
        self._connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=TIMEOUT_S)

    def asked(self, endpoint: str, body: dict[str, Any]) -> Callable[[], Any]:
        """Ask for something; returns what waits for the answer."""
        self._connection.request("POST", endpoint, json.dumps(body), {"Authorization": f"Bearer {self.key}"})

        def answer() -> Any:
            response = self._connection.getresponse()
            text = response.read()
            assert response.status == http.client.OK, f"{endpoint}: {text!r}"
            return json.loads(text)

        return answer

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._connection.close()
        self._process.stdin.close()  # which it waits for
        self._process.wait(timeout=TIMEOUT_S)


class Weights:
    """What the process that receives holds, and what it does with requests."""

    def __init__(self) -> None:
        self._groups: dict[str, dist.ProcessGroupGloo] = {}
        self._buckets: list[Bucket] = []
        self._label = ""

    def answer(self, endpoint: str, body: dict[str, Any]) -> Any:
        """What is answered to a request."""
        match endpoint.partition("?")[0]:
            case "/server_info":
                return {"tp_size": 1}
            case "/model_info":
                return {"weight_version": self._label}
            case "/init_weights_update_group":
                at = (body["master_address"], body["master_port"])
                self._groups[body["group_name"]] = join(*at, body["group_name"], body["rank_offset"])
            case "/destroy_weights_update_group":
                del self._groups[body["group_name"]]
            case "/begin_weight_update":
                self._buckets = []
            case "/update_weights_from_distributed":
                self._buckets.append(self._received(body))
            case "/update_weight_version":
                self._label = body["new_version"]
            case "/receive":  # the probe's
                for size in body["sizes"]:
                    self._receive(body["group_name"], size)
            case "/save":  # the newest weights to a file, for a look at their bits
                save_file({name: t for bucket in self._buckets for name, t in bucket.tensors().items()}, body["path"])
            case "/processor_time":
                return time.process_time()
            case "/end_weight_update" | "/flush_cache" | "/health":
                pass
            case unknown:
                raise LookupError(unknown)
        return {"success": True}

    def _received(self, body: dict[str, Any]) -> Bucket:
        names, dtypes = body["names"], body["dtypes"]
        shapes = tuple(tuple(shape) for shape in body["shapes"])
        sizes = [math.prod(shape) * getattr(torch, dtype).itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
        return Bucket(tuple(names), tuple(dtypes), shapes, self._receive(body["group_name"], sum(sizes)))

    def _receive(self, group: str, size: int) -> torch.Tensor:
        data = torch.empty(size, dtype=torch.uint8)
        self._groups[group].broadcast([data], dist.BroadcastOptions()).wait()
        return data


def join(address: str, port: int, name: str, rank: int) -> dist.ProcessGroupGloo:
    """Join a group of two as `init_custom_process_group` does (SGLang 0.5.21, srt/utils/common.py)."""
    timeout = timedelta(seconds=TIMEOUT_S)
    store: dist.Store = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    for prefix in (name, f"{name}/", "cpu/"):
        store = dist.PrefixStore(prefix, store)
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, 2, options)


def plain_broadcast(receiver: Receiver, pieces: Sequence[torch.Tensor]) -> Callable[[], None]:
    """The probe: gloo's broadcast of `pieces`, [bytes] uint8 each, by nothing but torch."""
    name = "probe"
    listening = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    joined = receiver.asked(
        "/init_weights_update_group",
        {"master_address": "127.0.0.1", "master_port": listening.port, "group_name": name, "rank_offset": 1},
    )
    group = join("127.0.0.1", listening.port, name, 0)
    joined()
    body = {"group_name": name, "sizes": [len(piece) for piece in pieces]}

    def run() -> None:
        taken = receiver.asked("/receive", body)
        for piece in pieces:
            group.broadcast([piece], dist.BroadcastOptions()).wait()
        taken()

    return run


def serve(weights: Weights, key: str) -> ThreadingHTTPServer:
    """A server of `weights` on a free loopback port for those who have the key; its caller runs it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections stay
        # An answer is two writes; the second would wait until the asking side confirms the first, which takes it 40 ms.
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self._answer({})

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, format: str, *arguments: Any) -> None:
            """Say nothing."""

        def _answer(self, body: dict[str, Any]) -> None:
            status, said = 200, b""
            if not secrets.compare_digest(self.headers.get("Authorization", ""), f"Bearer {key}"):
                status = 401
            else:
                try:
                    said = json.dumps(weights.answer(self.path, body)).encode()
                except LookupError:
                    status = 404
            self.send_response(status)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


def main() -> None:
    """Serve until standard input ends; its first line is the key."""
    torch.set_num_threads(1)
    server = serve(Weights(), sys.stdin.readline().strip())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
