"""What weights take to reach the rollout engines, and what those sample a second: a table for docs/rollouts.md.

    python tools/measure_rollouts.py [--rounds 5] [--hidden-size 512] [--vocabulary 32000] [--servers 1]

One trainer in float32 with random weights, the local engine, and real SGLang servers that this starts. Ways take turns
within every round, so that a machine whose speed swings slows them all alike. The first round is left out; of the others the
tables give medians with the least and the most, and the same of each way's ratio to the first way in the same round, which
says more where other work shares the machine. A hand-over is measured as the trainer sees it: from the first weight
exported until every server computes with them. Memory that is released and resumed (`rollout.sglang.release_memory`) is not
measured: it takes servers on GPUs.
"""

from __future__ import annotations

import argparse
import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml
from transformers import Qwen3MoeConfig

from megatron_gspo import parallel
from megatron_gspo.config import ParallelSection, Recipe, load_recipe
from megatron_gspo.data.tokenizer import build_byte_tokenizer
from megatron_gspo.model.build import build_policy
from megatron_gspo.model.hf_weights import export_hf_weights, initialize_weights
from megatron_gspo.platform import device
from megatron_gspo.rollout.engine import RolloutEngine
from megatron_gspo.rollout.local import LocalEngine
from megatron_gspo.rollout.sglang import ServerHost, SglangEngine
from megatron_gspo.types import Prompt, SamplingSettings


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as directory:
        recipe = write_recipe(Path(directory), arguments)
        parallel.initialize_distributed()
        parallel.initialize_model_parallel(ParallelSection(), seed=1)
        config = Qwen3MoeConfig.from_pretrained(recipe.model.path)
        policy = build_policy(config, recipe.model, ParallelSection())
        initialize_weights(policy, seed=1, initializer_range=0.02)

        def export() -> Iterator[tuple[str, torch.Tensor]]:
            return export_hf_weights(policy)

        local = LocalEngine(recipe.model.path, device=device())
        host = ServerHost(recipe, on_cpu=device().type == "cpu")
        load = os.getloadavg()[0]
        try:
            measure_weights(recipe, host, local, export, arguments.rounds)
            with connected(recipe, host, "disk") as engine:
                engine.update_weights(export(), 1)
                measure_sampling({"local": local, "SGLang": engine}, config.vocab_size, arguments)
        finally:
            host.close()
        print(
            f"\n{os.cpu_count()} cores, {torch.get_num_threads()} threads a process, "
            f"load average {load:.1f} before and {os.getloadavg()[0]:.1f} after"
        )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--bucket-mib", type=int, default=64, help="rollout.sglang.weight_bucket_bytes, in MiB")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--responses", type=int, default=4, help="responses to each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a prompt, and of a response")
    return parser.parse_args()


def write_recipe(directory: Path, arguments: argparse.Namespace) -> Recipe:
    """A model's directory without weights, and a recipe that serves it."""
    model, hidden_size = directory / "model", arguments.hidden_size
    Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        vocab_size=arguments.vocabulary,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=hidden_size // 8,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=hidden_size // 4,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="float32",
    ).save_pretrained(model)
    build_byte_tokenizer().save_pretrained(model)
    server = {
        "num_servers": arguments.servers,
        "memory_fraction": 0.3,
        "max_total_tokens": 16384,
        "max_requests_in_flight": 64,
        "weight_bucket_bytes": arguments.bucket_mib * 1024**2,
    }
    rollout = {"engine": "sglang", "sglang": server, "max_response_tokens": arguments.tokens}
    recipe = {
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": "arithmetic_chain"},
        "rollout": rollout,
        "training": {"steps": 1, "prompts_per_step": 4},
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return load_recipe(directory / "recipe.yaml", [])


def measure_weights(
    recipe: Recipe,
    host: ServerHost,
    local: LocalEngine,
    export: Callable[[], Iterator[tuple[str, torch.Tensor]]],
    rounds: int,
) -> None:
    """Hand the weights over by every way in turn."""
    num_bytes = sum(tensor.nbytes for _, tensor in export())
    seconds: dict[str, list[float]] = {"disk": [], "broadcast": [], "local": []}
    for _ in range(rounds + 1):
        for name, taken in seconds.items():
            if name == "local":
                taken.append(timed_update(local, export, 0))
                continue
            with connected(recipe, host, name) as engine:
                engine.update_weights(export(), 0)  # a group's making is not measured: it lasts for all of a run
                taken.append(timed_update(engine, export, 1))
                if any(endpoint.is_out for endpoint in engine._client.endpoints):
                    raise SystemExit(f"{name}: a server did not get the weights")
    print_table(f"{num_bytes / 1e6:.0f} MB of weights, s", seconds, "{:.2f}")
    print_table("GB/s", {name: [num_bytes / 1e9 / each for each in taken] for name, taken in seconds.items()}, "{:.3f}")


def timed_update(
    engine: RolloutEngine, export: Callable[[], Iterator[tuple[str, torch.Tensor]]], version: int
) -> float:
    """Seconds from the first weight exported until the engine computes with them."""
    started = time.perf_counter()
    engine.update_weights(export(), version)
    return time.perf_counter() - started


@contextmanager
def connected(recipe: Recipe, host: ServerHost, transport: str) -> Iterator[SglangEngine]:
    """An engine on the servers, as a run of its own: one at a time, because each keeps them at its own weights."""
    section = recipe.rollout.sglang.model_copy(update={"weight_transport": transport})
    rollout = recipe.rollout.model_copy(update={"sglang": section})
    connection = replace(host.connection, run_id=secrets.token_hex(4))
    engine = SglangEngine(recipe.model_copy(update={"rollout": rollout}), connection, host=host)
    try:
        yield engine
    finally:
        engine._sync.close()


def measure_sampling(ways: dict[str, RolloutEngine], vocabulary: int, arguments: argparse.Namespace) -> None:
    """Sample responses of one length to the same prompts with every engine in turn."""
    token_ids = np.random.default_rng(0).integers(vocabulary, size=(arguments.prompts, arguments.tokens))
    prompts = [
        Prompt(id=str(row), token_ids=tuple(ids.tolist()), text="", answer="") for row, ids in enumerate(token_ids)
    ]
    settings = SamplingSettings(max_response_tokens=arguments.tokens, temperature=1.0, stop_token_ids=(), seed=1)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds + 1):
        for name, engine in ways.items():
            started = time.perf_counter()
            groups = engine.generate(prompts, arguments.responses, settings)
            sampled = sum(len(response.token_ids) for group in groups for response in group)
            assert sampled == arguments.prompts * arguments.responses * arguments.tokens, "nothing stops early"
            rates[name].append(sampled / (time.perf_counter() - started))
    what = f"{arguments.prompts} × {arguments.responses} responses of {arguments.tokens} tokens, tokens/s"
    print_table(what, rates, "{:.0f}")


def print_table(what: str, found: Mapping[str, Sequence[float]], form: str) -> None:
    """A row a way: what was found round by round, and its ratio to the first way's; the first round does not count."""
    (first, base), *_ = found.items()
    print(f"\n| {what} | median (least to most) | of {first} in the same round |\n| --- | --- | --- |", flush=True)
    for name, rounds in found.items():
        ratios = [here / there for here, there in zip(rounds, base, strict=True)]
        print(f"| {name} | {_spread(rounds[1:], form)} | {_spread(ratios[1:], '{:.2f}')} |", flush=True)


def _spread(values: Sequence[float], form: str) -> str:
    median, least, most = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    return f"{median} ({least} to {most})"


if __name__ == "__main__":
    main()
