"""A training step at Qwen3-30B-A3B's true layer shapes on one GPU: tokens/s, MFU, peak memory and where the time goes.

    python tools/bench/gpu.py [--tokens 16384 65536] [--layers N] [--steps 5]      on a GPU
    python tools/bench/gpu.py --tiny                                               on any machine, its logic alone

As many layers as fit are taken where `--layers` does not say. A step is this project's own (`training/step.py`): forward
and backward of packed responses of 4,096 tokens, GSPO's loss, and the optimizer. The first step is not counted. Beforehand
the losses and gradients of a tiny model in bfloat16 are held against the CPU's. Without a GPU it says what it would
measure; `--tiny` runs every line at shapes of no interest and reports no time.

MFU counts what the mathematics needs, 6 operations a parameter that a token passes through and 12 · heads · head size a
pair of tokens that attend to each other and layer, half of them under the causal mask, over the GPU's dense bfloat16 peak.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from megatron_gspo import parallel  # noqa: E402
from megatron_gspo.config import Recipe, load_recipe  # noqa: E402
from megatron_gspo.data.tokenizer import build_byte_tokenizer  # noqa: E402
from megatron_gspo.memory import GIB, estimate  # noqa: E402
from megatron_gspo.platform import device  # noqa: E402
from megatron_gspo.training.assembly import build_models, reinforcement_learning_rate  # noqa: E402
from megatron_gspo.training.experience import MiniBatch, pack_samples  # noqa: E402
from megatron_gspo.training.forward import token_log_probs  # noqa: E402
from megatron_gspo.training.guards import SkippedUpdates  # noqa: E402
from megatron_gspo.training.optimizer import TrainablePolicy, build_trainable_policy  # noqa: E402
from megatron_gspo.training.step import MiniBatchLoss, update_policy  # noqa: E402
from megatron_gspo.training.totals import Totals  # noqa: E402
from megatron_gspo.types import Sample  # noqa: E402

SHAPES = ROOT / "recipes/models/qwen3_30b_a3b/config.json"
RESPONSE_TOKENS, PROMPT_TOKENS = 4096, 512  # of a packed sequence, prompt included; and of that prompt
#: Dense bfloat16 peaks in operations a second, as NVIDIA's data sheets give them without sparsity.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}
#: What published runs of the same model on 8 H200 came to (prime-rl's benchmark).
PUBLISHED_MFU = {16_384: 0.028, 65_536: 0.154}


@dataclass(frozen=True)
class Measured:
    """Steps of one size."""

    tokens: int
    seconds: list[float]  # a step
    flops: float  # a step
    peak_gib: float
    parts: list[tuple[str, float]]  # operator, its share of the device's time


def main() -> int:
    """Measure, or say what would be measured."""
    arguments = parser().parse_args()
    if arguments.gradients:
        return write_gradients(arguments.gradients)
    if not torch.cuda.is_available() and not arguments.tiny:
        print(
            "No GPU here. On one this measures a GSPO step at Qwen3-30B-A3B's layer shapes, as many layers as fit, at "
            f"{' and '.join(f'{tokens:,}' for tokens in arguments.tokens)} packed tokens: tokens/s, MFU, peak GiB and the "
            "share of each operator, after holding the losses and gradients of a tiny model against the CPU's. "
            "--tiny runs the same lines here at tiny shapes."
        )
        return 0
    compare_with_cpu()
    token_counts = [256] if arguments.tiny else arguments.tokens
    with tempfile.TemporaryDirectory() as directory:
        changes = tiny_shapes() if arguments.tiny else {}
        layers = arguments.layers or (2 if arguments.tiny else most_layers(Path(directory), max(token_counts)))
        recipe = write_recipe(Path(directory), changes | {"num_hidden_layers": layers}, max(token_counts))
        start_one_rank(recipe)
        policy = build_trainable_policy(build_models(recipe), recipe, reinforcement_learning_rate(recipe))
        for tokens in token_counts:
            report(measure(policy, recipe, tokens, arguments.steps), layers, shows_times=not arguments.tiny)
        parallel.shutdown()
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16_384, 65_536], help="packed tokens of a step")
    parser.add_argument("--layers", type=int, help="layers of the model (default: as many as fit)")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed (default: 5)")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on any machine; reports no time")
    parser.add_argument("--gradients", type=Path, help=argparse.SUPPRESS)  # write a tiny model's to this file
    return parser


def tiny_shapes() -> dict[str, Any]:
    """A model of which every line is exercised in seconds."""
    return {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "vocab_size": 512,
    }


def write_recipe(directory: Path, changes: dict[str, Any], tokens: int) -> Recipe:
    """A recipe of one rank, with the model's shapes changed so."""
    model = directory / "model"
    model.mkdir(exist_ok=True)
    shapes = json.loads(SHAPES.read_text()) | changes
    (model / "config.json").write_text(json.dumps(shapes))
    build_byte_tokenizer().save_pretrained(model)
    (directory / "recipe.yaml").write_text(
        f"""
model: {{path: {model}, dtype: bfloat16, spec: local, recompute: full}}
data: {{train: arithmetic_chain}}
objective: {{name: gspo}}
routing: {{measure: false}}
rollout: {{responses_per_prompt: 8, max_prompt_tokens: {PROMPT_TOKENS}, max_response_tokens: {RESPONSE_TOKENS}}}
training: {{steps: 100, prompts_per_step: 4, mini_batches: 1, tokens_per_micro_batch: {tokens}, learning_rate: 1.0e-6}}
"""
    )
    return load_recipe(directory / "recipe.yaml")


def most_layers(directory: Path, tokens: int) -> int:
    """As many layers as the estimate of `tools/plan.py` finds room for on this GPU."""
    free_gib = torch.cuda.mem_get_info()[0] / GIB
    layers = 1
    while estimate(write_recipe(directory, {"num_hidden_layers": layers + 1}, tokens)).fits(free_gib):
        layers += 1
    return layers


def start_one_rank(recipe: Recipe) -> None:
    """Process groups of one rank."""
    parallel.initialize_distributed()
    parallel.initialize_model_parallel(recipe.parallel, recipe.seed)


def mini_batch(recipe: Recipe, tokens: int) -> MiniBatch:
    """Random responses with random advantages that fill `tokens` tokens, as one mini-batch."""
    rng = np.random.default_rng(0)
    length = min(RESPONSE_TOKENS, tokens // 4)
    prompt = min(PROMPT_TOKENS, length // 4)
    samples = []
    for index in range(tokens // length):
        ids = rng.integers(0, 256, length)
        log_probs = np.zeros(length - prompt, dtype=np.float32)
        samples.append(Sample(index, ids[:prompt], ids[prompt:], float(rng.normal()), log_probs))
    num_response_tokens = sum(len(sample.response_token_ids) for sample in samples)
    return MiniBatch(pack_samples(samples, recipe, pad_token_id=0), len(samples), num_response_tokens)


def update(policy: TrainablePolicy, recipe: Recipe, batch: MiniBatch, old: list[torch.Tensor]) -> Totals:
    """One step of the project's own."""
    totals = Totals()
    loss = MiniBatchLoss(recipe, batch, old, None)
    update_policy(policy, batch, loss, SkippedUpdates(0), 1, totals, measure_mismatch=False)
    return totals


def measure(policy: TrainablePolicy, recipe: Recipe, tokens: int, steps: int) -> Measured:
    """Time `steps` steps after one that is not counted, then look into another."""
    batch = mini_batch(recipe, tokens)
    old = token_log_probs(policy.chunks, batch.micro_batches, temperature=1.0)
    update(policy, recipe, batch, old)
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(steps):
        synchronize()
        started = time.perf_counter()
        update(policy, recipe, batch, old)
        synchronize()
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / GIB if device().type == "cuda" else 0.0
    with torch.profiler.profile() as profiler:
        update(policy, recipe, batch, old)
        synchronize()
    return Measured(tokens, seconds, step_flops(policy, batch), peak, shares(profiler))


def shares(profiler: torch.profiler.profile, top: int = 12) -> list[tuple[str, float]]:
    """The operators that take most of the device's time."""
    name = "self_device_time_total" if device().type == "cuda" else "self_cpu_time_total"
    spent = {event.key: float(getattr(event, name)) for event in profiler.key_averages()}
    total = sum(spent.values())
    return [(key, value / total) for key, value in sorted(spent.items(), key=lambda item: -item[1])[:top]]


def step_flops(policy: TrainablePolicy, batch: MiniBatch) -> float:
    """Operations that a step's mathematics needs, forward and backward; nothing for what is recomputed."""
    config = policy.models[0].config
    active = 0.0
    for name, parameter in policy.models[0].named_parameters():
        if "embedding" in name or parameter.ndim < 2:
            continue
        of_experts = ".experts." in name
        active += parameter.numel() * (config.moe_router_topk / config.num_moe_experts if of_experts else 1.0)
    num_tokens = sum(len(micro_batch.token_ids) for micro_batch in batch.micro_batches)
    pairs = sum(
        float(micro_batch.segment_cu_seqlens.diff().double().square().sum()) for micro_batch in batch.micro_batches
    )
    attention = 12.0 * config.num_layers * config.num_attention_heads * config.kv_channels * pairs / 2
    return 6.0 * active * num_tokens + attention


def report(measured: Measured, layers: int, *, shows_times: bool) -> None:
    """Print what was measured."""
    print(f"{measured.tokens:,} packed tokens, {layers} layers, {measured.flops / 1e12:.3g} TFLOP a step")
    if shows_times:
        best = sorted(measured.seconds)
        median = best[len(best) // 2]
        print(
            f"  tokens/s {measured.tokens / median:,.0f} ({measured.tokens / best[-1]:,.0f} – {measured.tokens / best[0]:,.0f})"
        )
        name = torch.cuda.get_device_name()
        peak = next((peak for gpu, peak in PEAKS.items() if gpu in name), None)
        if peak is None:
            print(f"  MFU unknown: no peak is listed for {name}; {measured.flops / median / 1e12:.0f} TFLOP/s")
        else:
            published = PUBLISHED_MFU.get(measured.tokens)
            beside = f", published elsewhere {published:.1%}" if published else ""
            print(f"  MFU {measured.flops / median / peak:.1%}{beside}")
        print(f"  peak memory {measured.peak_gib:.1f} GiB")
    print("  time by operator: " + ", ".join(f"{name} {share:.0%}" for name, share in measured.parts))


def compare_with_cpu() -> None:
    """Hold the loss and gradients of a tiny bfloat16 model here against those of a process that sees no GPU.

    Raises:
        AssertionError: they differ by more than bfloat16 rounds off.
    """
    with tempfile.TemporaryDirectory() as directory:
        found = {}
        for name, visible in (("here", os.environ.get("CUDA_VISIBLE_DEVICES")), ("cpu", "")):
            file = Path(directory) / f"{name}.pt"
            settings = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
            command = [sys.executable, str(Path(__file__).resolve()), "--gradients", str(file)]
            subprocess.run(command, env=os.environ | settings, check=True)
            found[name] = torch.load(file, weights_only=True)
    worst = 0.0
    assert any(bool(gradient.any()) for gradient in found["cpu"].values()), "there is something to compare"
    for name, expected in found["cpu"].items():
        norm = float(expected.double().norm())
        worst = max(worst, float((found["here"][name].double() - expected.double()).norm()) / norm if norm else 0.0)
    assert worst < 0.05, f"the gradients differ from the CPU's by {worst:.1%} of their norm"
    print(f"Losses and gradients of a tiny bfloat16 model: within {worst:.2%} of the CPU's (norm of each parameter's)")


def write_gradients(file: Path) -> int:
    """The loss and every gradient of a tiny model after one backward pass, to `file`. The same weights everywhere."""
    with tempfile.TemporaryDirectory() as directory:
        recipe = write_recipe(Path(directory), tiny_shapes() | {"num_hidden_layers": 2}, tokens=256)
        start_one_rank(recipe)
        policy = build_trainable_policy(build_models(recipe), recipe, reinforcement_learning_rate(recipe))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in policy.models[0].parameters():
                if parameter.ndim > 1:
                    values = torch.randn(parameter.shape, generator=generator) * 0.04
                    parameter.copy_(values.to(parameter.device, parameter.dtype))
        batch = mini_batch(recipe, 256)
        old = token_log_probs(policy.chunks, batch.micro_batches, temperature=1.0)
        totals = update(policy, recipe, batch, [log_probs.clone() for log_probs in old])
        found = {name: parameter.main_grad.float().cpu() for name, parameter in policy.models[0].named_parameters()}
        torch.save(found | {"loss": torch.tensor(totals.sums["loss/policy"][0])}, file)
        parallel.shutdown()
    return 0


def synchronize() -> None:
    """Wait for the device, so that clocks tell the truth."""
    if device().type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    raise SystemExit(main())
