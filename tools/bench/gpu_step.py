"""The training step that `gpu.py` measures: its recipe, its batch, the operations it needs, and what is said of it.

In: shapes of a model and a number of packed tokens. Out: a `Measured`: seconds a step, operations a step, peak memory.
"""

from __future__ import annotations

import json
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_gspo import parallel
from megatron_gspo.config import Recipe, load_recipe
from megatron_gspo.data.tokenizer import build_byte_tokenizer
from megatron_gspo.memory import GIB, estimate
from megatron_gspo.platform import device
from megatron_gspo.training.assembly import build_models, reinforcement_learning_rate
from megatron_gspo.training.experience import MiniBatch, pack_samples
from megatron_gspo.training.forward import token_log_probs
from megatron_gspo.training.guards import SkippedUpdates
from megatron_gspo.training.optimizer import TrainablePolicy, build_trainable_policy
from megatron_gspo.training.step import MiniBatchLoss, update_policy
from megatron_gspo.training.totals import Totals
from megatron_gspo.types import Sample

SHAPES = Path(__file__).resolve().parents[2] / "recipes/models/qwen3_30b_a3b/config.json"
RESPONSE_TOKENS, PROMPT_TOKENS = 4096, 512  # of a packed sequence, prompt included; and of that prompt
#: Dense bfloat16 peaks in operations a second, as NVIDIA's data sheets give them without sparsity.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}
#: MFU that prime-rl publishes for this model, by packed tokens.
PUBLISHED_MFU = {16_384: 0.028, 65_536: 0.154}


@dataclass(frozen=True)
class Operations:
    """What the mathematics of a step needs, forward and backward; nothing for what is recomputed."""

    layers: float  # matrices that every token passes through, and attention
    output_layer: float  # of the response tokens alone: no other reaches it (`model/policy.py`)


@dataclass(frozen=True)
class Measured:
    """Steps of one size."""

    tokens: int
    seconds: list[float]  # a step
    operations: Operations
    peak_gib: float
    parts: list[tuple[str, float]]  # operator, its share of the device's time


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
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def write_recipe(directory: Path, changes: dict[str, Any], tokens: int, *, dtype: str = "bfloat16") -> Recipe:
    """A recipe of one rank, with the model's shapes changed so.

    The rollout engine is one outside this process, as nothing here samples: the estimate would reserve a local one's
    memory.
    """
    model = directory / "model"
    model.mkdir(exist_ok=True)
    shapes = json.loads(SHAPES.read_text()) | changes
    (model / "config.json").write_text(json.dumps(shapes))
    build_byte_tokenizer().save_pretrained(model)
    (directory / "recipe.yaml").write_text(
        f"""
model: {{path: {model}, dtype: {dtype}, spec: local, recompute: full}}
data: {{train: arithmetic_chain}}
objective: {{name: gspo}}
routing: {{measure: false}}
rollout:
  engine: sglang
  responses_per_prompt: 8
  max_prompt_tokens: {PROMPT_TOKENS}
  max_response_tokens: {RESPONSE_TOKENS}
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


def build(recipe: Recipe) -> TrainablePolicy:
    """The policy on the one rank that this process is. `parallel.shutdown` ends the rank."""
    parallel.initialize_distributed()
    parallel.initialize_model_parallel(recipe.parallel, recipe.seed)
    return build_trainable_policy(build_models(recipe), recipe, reinforcement_learning_rate(recipe))


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


def update(
    policy: TrainablePolicy,
    recipe: Recipe,
    batch: MiniBatch,
    old: list[torch.Tensor],
    routing: AbstractContextManager[Any] | None = None,
) -> Totals:
    """One step of the project's own; `old` is log π_old, [T] float32 a micro-batch."""
    totals = Totals()
    loss = MiniBatchLoss(recipe, batch, old, None)
    update_policy(policy, batch, loss, SkippedUpdates(0), 1, totals, measure_mismatch=False, routing=routing)
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
    return Measured(tokens, seconds, step_operations(policy, batch), peak, shares(profiler))


def shares(profiler: torch.profiler.profile, top: int = 12) -> list[tuple[str, float]]:
    """The operators that take most of the device's time. Kernels are their operators', and not counted again."""
    name = "self_device_time_total" if device().type == "cuda" else "self_cpu_time_total"
    operators = [event for event in profiler.key_averages() if event.device_type.name == "CPU"]
    spent = {event.key: float(getattr(event, name)) for event in operators}
    total = sum(spent.values())
    return [(key, value / total) for key, value in sorted(spent.items(), key=lambda item: -item[1])[:top]]


def step_operations(policy: TrainablePolicy, batch: MiniBatch) -> Operations:
    """6 a parameter and token that passes through it; and attention's, half of all pairs under the causal mask."""
    config = policy.models[0].config
    active = output_layer = 0.0
    for name, parameter in policy.models[0].named_parameters():
        if "embedding" in name or parameter.ndim < 2:
            continue
        if name.startswith("output_layer."):
            output_layer += parameter.numel()
        else:
            is_expert = ".experts." in name
            active += parameter.numel() * (config.moe_router_topk / config.num_moe_experts if is_expert else 1.0)
    num_tokens = sum(len(micro_batch.token_ids) for micro_batch in batch.micro_batches)
    pairs = sum(
        float(micro_batch.segment_cu_seqlens.diff().double().square().sum()) for micro_batch in batch.micro_batches
    )
    attention = 12.0 * config.num_layers * config.num_attention_heads * config.kv_channels * pairs / 2
    num_response_tokens = sum(len(micro_batch.target_token_ids) for micro_batch in batch.micro_batches)
    return Operations(6.0 * active * num_tokens + attention, 6.0 * output_layer * num_response_tokens)


def report(measured: Measured, layers: int, *, shows_times: bool) -> None:
    """Print what was measured."""
    of_layers, of_output = measured.operations.layers, measured.operations.output_layer
    print(
        f"{measured.tokens:,} packed tokens, {layers} layers, {(of_layers + of_output) / 1e12:.3g} TFLOP a step, "
        f"of which {of_output / (of_layers + of_output):.0%} in the output layer"
    )
    if shows_times:
        ordered = sorted(measured.seconds)
        median = ordered[len(ordered) // 2]
        fewest, most = measured.tokens / ordered[-1], measured.tokens / ordered[0]
        print(f"  tokens/s {measured.tokens / median:,.0f} ({fewest:,.0f} – {most:,.0f})")
        print(f"  {mfu(measured, median, torch.cuda.get_device_name())}")
        print(f"  peak memory {measured.peak_gib:.1f} GiB")
    print("  time by operator: " + ", ".join(f"{name} {share:.0%}" for name, share in measured.parts))


def mfu(measured: Measured, seconds: float, gpu: str) -> str:
    """The line on model FLOPs utilization of a step that takes `seconds` on a GPU of this name."""
    of_layers = measured.operations.layers / seconds
    of_all = of_layers + measured.operations.output_layer / seconds
    peak = next((peak for name, peak in PEAKS.items() if name in gpu), None)
    if peak is None:
        return f"MFU unknown: no peak is listed for {gpu}; {of_all / 1e12:.0f} TFLOP/s"
    line = f"MFU {of_all / peak:.1%}; {of_layers / peak:.1%} without counting the output layer's operations"
    published = PUBLISHED_MFU.get(measured.tokens)
    if published is None:
        return line
    return f"{line}; prime-rl publishes {published:.1%} for all 48 layers on 8 H200, communication included"


def synchronize() -> None:
    """Wait for the device, so that clocks tell the truth."""
    if device().type == "cuda":
        torch.cuda.synchronize()
