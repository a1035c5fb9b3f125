"""What the tests against a real SGLang server share: a policy, what Transformers computes with it, an engine, a proxy."""

from __future__ import annotations

import json
import secrets
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import torch
from transformers import PreTrainedModel, Qwen3MoeForCausalLM

from megatron_gspo.config import Recipe, load_recipe
from megatron_gspo.rollout.sglang import ServerHost, SglangEngine
from megatron_gspo.types import Prompt, Response, SamplingSettings
from tests.tiny_model import tiny_recipe, write_tiny_model

PROMPTS = [
    Prompt(id=f"test:{index}", token_ids=token_ids, text="", answer="")
    for index, token_ids in enumerate([(3, 4, 5, 6, 7, 8, 9), (10,), (11, 12, 3), (4, 4, 17, 20)])
]
SETTINGS = SamplingSettings(
    max_response_tokens=12, temperature=0.7, stop_token_ids=(1, 2, 3, 4, 5, 6, 7, 8, 258), seed=5
)
TIE = 1e-6
"""A difference of two experts' probabilities that rounding in float32 may turn round."""


def write_model_and_recipe(directory: Path) -> Path:
    """A tiny Qwen3-MoE model, and a recipe that serves it."""
    model = write_tiny_model(
        directory / "model",
        architectures=["Qwen3MoeForCausalLM"],
        num_hidden_layers=3,
        num_experts=8,
    )
    recipe = directory / "recipe.yaml"
    recipe.write_text(
        tiny_recipe(
            model,
            routing={"replay": "r3"},
            rollout={
                "engine": "sglang",
                "temperature": 0.8,
                "responses_per_prompt": 4,
                "max_response_tokens": 12,
                "sglang": {
                    "num_servers": 2,
                    "memory_fraction": 0.3,
                    "max_total_tokens": 8192,
                    "max_requests_in_flight": 32,
                    "startup_timeout_s": 600.0,
                    "request_timeout_s": 120.0,
                    "outage_timeout_s": 900.0,
                },
            },
            reward={"name": "tests.end_to_end.graded_reward:share_of_odd_characters"},
        )
    )
    return recipe


def policy(recipe: Recipe, seed: int) -> PreTrainedModel:
    """Transformers' model with random weights, large enough that another seed's show in every log-prob."""
    config = Qwen3MoeForCausalLM.config_class.from_pretrained(recipe.model.path)
    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM(config).eval()


def weights_of(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights under the names a checkpoint has: each expert's matrices by themselves."""
    for name, tensor in model.state_dict().items():
        layer, separator, projection = name.rpartition(".experts.")
        if not separator:
            yield name, tensor
            continue
        for expert, matrix in enumerate(tensor):
            parts = ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",)
            for part, piece in zip(parts, matrix.chunk(len(parts)), strict=True):
                yield f"{layer}.experts.{expert}.{part}.weight", piece


@torch.no_grad()
def by_transformers(
    model: PreTrainedModel, prompt: Prompt, response: Response, temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs [response] of the tokens sampled, and routes [prompt + response - 1, MoE layers, K], from one plain pass.

    Of experts that are as probable as each other to `TIE`, those are taken that the response was sampled with: another order
    of the same sums decides between them, and thousands of tokens have such a pair now and then.
    """
    chosen: list[torch.Tensor] = []
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]

    def choose(gate: torch.nn.Module, _: object, outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits, weights, experts = outputs
        if response.routed_experts is not None:
            sampled_with = torch.from_numpy(response.routed_experts[:, len(chosen)].astype(np.int64))
            probabilities = logits.float().softmax(-1)
            before_last = probabilities[: len(sampled_with)]  # no route came with the last token
            own, others = (
                before_last.gather(1, which).sort().values for which in (experts[: len(sampled_with)], sampled_with)
            )
            is_tied = (own - others).abs().amax(dim=1) < TIE
            experts[: len(sampled_with)][is_tied] = sampled_with[is_tied]
            weights = probabilities.gather(1, experts)
            weights = weights / weights.sum(-1, keepdim=True) if gate.norm_topk_prob else weights
        chosen.append(experts)
        return logits, weights.to(logits.dtype), experts

    hooks = [gate.register_forward_hook(choose) for gate in gates]
    token_ids = torch.tensor([[*prompt.token_ids, *response.token_ids.tolist()]])
    log_probs = (model(token_ids).logits[0].float() / temperature).log_softmax(-1)
    for hook in hooks:
        hook.remove()
    start, sampled = len(prompt.token_ids) - 1, torch.from_numpy(response.token_ids)
    of_sampled = log_probs[start:-1].gather(1, sampled[:, None])[:, 0]
    return of_sampled.numpy(), torch.stack(chosen, dim=1)[:-1].numpy()


def engine_on(recipe: Recipe, host: ServerHost, *urls: str) -> SglangEngine:
    """An engine with a run of its own on the session's first server, or on those reached through `urls`."""
    connection = replace(host.connection, run_id=secrets.token_hex(4), urls=urls or host.connection.urls[:1])
    return SglangEngine(recipe, connection, host=host)


@contextmanager
def engine_by(transport: str, recipe: Recipe, host: ServerHost, **fields: object) -> Iterator[SglangEngine]:
    """An engine on all of the session's servers that sends weights by `transport`, in buckets of a few tensors.

    One at a time: an engine that broadcasts keeps the servers at its own weights until it is closed.
    """
    fields = {"weight_bucket_bytes": 20_000, "weight_timeout_s": 60.0} | fields
    engine = engine_on(with_sglang(recipe, weight_transport=transport, **fields), host, *host.connection.urls)
    try:
        yield engine
    finally:
        engine._sync.close()


def with_sglang(recipe: Recipe, **fields: object) -> Recipe:
    section = recipe.rollout.sglang.model_copy(update=fields)
    return recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"sglang": section})})


def servers_of(host: ServerHost, url: str | None = None) -> list[str]:
    """Overrides for a run on the session's first server, or on one of its servers that is reached through `url`."""
    return [
        f"rollout.sglang.urls={url or host.connection.urls[0]}",
        f"rollout.sglang.key_file={host.servers.key_file}",
    ]


def both_are_up(host: ServerHost) -> bool:
    """Whether the session's servers answer."""
    try:
        return all(httpx.get(f"{url}/health", trust_env=False).status_code == 200 for url in host.connection.urls)
    except httpx.TransportError:
        return False


def wait_until(is_so: Callable[[], bool], what: str, timeout_s: float = 600.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"{what} within {timeout_s:g} s"
        time.sleep(0.1)


def load(path: Path, *overrides: str) -> Recipe:
    return load_recipe(path, overrides)


@contextmanager
def faulty_proxy(server: str, faults: Sequence[str]) -> Iterator[str]:
    """The URL of a proxy in front of `server` that answers its first requests to /generate with `faults`.

    "500" is said in place of an answer, "truncated" cuts one short, "not json" garbles it, "refused" breaks the connection,
    "hang" says nothing; "no key", one of an answer's keys, is left out of it.
    """
    left, ending = deque(faults), threading.Event()

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # an answer is several writes

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.forward(None)

        def do_POST(self) -> None:
            self.forward(self.rfile.read(int(self.headers["Content-Length"])))

        def forward(self, body: bytes | None) -> None:
            fault = left.popleft() if self.path == "/generate" and left else ""
            if fault == "refused" or ending.is_set():  # a connection that is kept outlives the proxy's own socket
                self.close_connection = True
                return
            if fault == "hang":
                ending.wait()
                self.close_connection = True
                return
            if fault == "500":
                self.answer(500, b"out of order")
                return
            headers = {name: self.headers[name] for name in ("Authorization", "Content-Type") if name in self.headers}
            with urllib.request.urlopen(urllib.request.Request(server + self.path, body, headers)) as opened:
                content = opened.read()
            if fault == "not json":
                content = content[:-20]
            if fault.startswith("no "):
                answer = json.loads(content)
                answer["meta_info"].pop(fault.removeprefix("no "))
                content = json.dumps(answer).encode()
            self.answer(200, content, cut=20 if fault == "truncated" else 0)

        def answer(self, status: int, content: bytes, cut: int = 0) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) - cut])
            self.close_connection = cut > 0

    with _serving(Proxy) as url:
        try:
            yield url
        finally:
            ending.set()


@contextmanager
def _serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The URL of a server on loopback that answers by `handler`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def wait_until_gone(pid: int, timeout_s: float = 60.0) -> bool:
    """Whether a process of another parent ends; a zombie that nobody has asked about is gone too."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False
