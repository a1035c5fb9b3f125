"""The estimate of shipped recipes against numbers derived by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_gspo.config import ParallelSection, Recipe, load_recipe
from megatron_gspo.memory import GIB, ModelShapes, estimate
from megatron_gspo.memory.activations import Activations
from megatron_gspo.memory.buffers import plan_buffer
from megatron_gspo.memory.shapes import Parameter

RECIPES = Path(__file__).parents[3] / "recipes"


def shipped(*overrides: str, name: str = "qwen3_30b_a3b_gspo") -> Recipe:
    return load_recipe(RECIPES / f"{name}.yaml", overrides)


@pytest.mark.parametrize(
    ("model", "total", "active"),
    [
        # Published as 30.5B with 3.3B active, and 235B with 22B active; a token's own: attention, router, norms and 8
        # experts of each layer, and both embeddings.
        ("qwen3_30b_a3b", 30_532_122_624, 3_353_032_704),
        ("qwen3_235b_a22b", 235_093_634_560, 22_190_763_520),
    ],
)
def test_parameters_of_the_published_models(model: str, total: int, active: int) -> None:
    shapes = ModelShapes.read(RECIPES / "models" / model)
    assert (shapes.num_parameters, shapes.num_active_parameters) == (total, active)


def test_active_parameters_of_the_30b_model_by_hand() -> None:
    attention, router, norms = 2048 * (2 * 4096 + 2 * 512), 128 * 2048, 2 * 2048 + 2 * 128
    layer = attention + router + norms + 8 * 3 * 2048 * 768
    shapes = ModelShapes.read(RECIPES / "models/qwen3_30b_a3b")
    assert shapes.num_active_parameters == 48 * layer + 2 * 151936 * 2048 + 2048


def test_weights_gradients_and_optimizer_states_of_the_30b_recipe() -> None:
    # Tensor 4, expert 8, data 8. All sizes are multiples of 128, so that the buffers hold no padding.
    attention = 2048 * 4096 // 4 + 2048 * (4096 + 2 * 512) // 4
    layer = attention + 128 * 2048 + 2 * 2048 + 2 * 128  # with the router and the norms
    dense = 48 * layer + 2 * 151936 * 2048 // 4 + 2048
    experts = 48 * 16 * 3 * 2048 * 768  # 16 of 128
    parts = estimate(shipped()).worst.parts
    assert parts["parameters"] == 2 * (dense + experts)
    assert parts["gradients"] == 4 * (dense + experts)
    # Two moments and a float32 copy, over 8 ranks; of the experts over the 4 ranks that have the same ones.
    assert parts["optimizer states"] == 12 * (dense // 8 + experts // 4)


def test_activations_of_a_layer_on_a_gpu() -> None:
    shapes = ModelShapes.read(RECIPES / "models/qwen3_30b_a3b")
    query, key, hidden = 4096, 512, 2048
    norms_and_their_outputs = 2 * (2 * hidden + 4) + 2 * (2 * hidden)
    queries_and_keys = 2 * (query + (query + 2 * key)) + 4 * (32 + 4)  # a copy of the queries; joined; 1/rms a head
    rotary = 2 * (query + key)  # turned queries and keys
    attended = 2 * query + 4 * 32
    routes = 8 * (8 + 8 + 4) + 128 * (1 + 4)
    experts = 8 * (2 * hidden + 2 * 5 * 768 + 4)
    a_token = norms_and_their_outputs + queries_and_keys + rotary + attended + routes + experts
    assert Activations(shapes, ParallelSection(), 2, "none", 1000).layer(is_moe=True) == 1000 * a_token


def test_recomputing_more_keeps_less() -> None:
    activations = [
        estimate(shipped(f"model.recompute={recompute}")).parts_gib["activations"]
        for recompute in ("none", "selective", "full")
    ]
    assert activations == sorted(activations, reverse=True)
    # Full: 48 layers' inputs of 32,768 / 4 tokens are 1.5 GiB; the rest is one layer made anew.
    assert 1.5 < activations[2] < 6


def test_the_routing_cache_grows_with_the_step_and_leaves_with_a_switch() -> None:
    # 256 · 16 / 8 responses of 18,432 tokens, a quarter each of 4 ranks, in 48 layers: 8 bytes of routes, 4 of a margin,
    # and a quarter of the routes again for the mini-batch being compared.
    tokens = 256 * 16 // 8 * 18432 // 4
    assert estimate(shipped()).worst.parts["routing cache"] == tokens * 48 * (8 + 4 + 2)
    replayed = estimate(shipped("routing.replay=r3")).worst.parts["routing cache"]
    assert replayed == tokens * 48 * (8 + 8 + 4 + 2)
    assert "routing cache" not in estimate(shipped("routing.routes_on_host=true")).worst.parts
    assert "routing cache" not in estimate(shipped("routing.measure=false")).worst.parts


def test_the_fullest_rank_is_named_by_what_it_holds() -> None:
    memory = estimate(shipped("parallel.pipeline=2", "parallel.data=4"))
    assert [rank.holds for rank in memory.stages] == ["embedding", "output layer"]
    assert memory.worst is max(memory.stages, key=lambda rank: rank.total)
    assert "log-prob logits" not in memory.stages[0].parts
    (alone,) = estimate(shipped()).stages
    assert alone.holds == "embedding and output layer"


def test_what_is_never_there_together_is_not_added_up() -> None:
    memory = estimate(shipped())
    at_peak = [size for part, size in memory.worst.parts.items() if memory.worst.is_at_peak(part)]
    assert memory.worst.total == sum(at_peak) < sum(memory.worst.parts.values())
    assert memory.fits(memory.total_gib)
    assert not memory.fits(memory.total_gib - 1 / GIB)


def test_a_reference_policy_takes_the_weights_once_more() -> None:
    parts = estimate(shipped("objective.kl_coefficient=0.01")).worst.parts
    assert parts["reference policy"] == parts["parameters"]


def test_a_buffer_is_padded_between_parameters_and_at_its_end() -> None:
    # Backwards: 10 at 0, 100 at 64, ending at 164, padded to a multiple of 3 · 128: 384, of which each rank owns 128.
    buffer = plan_buffer([Parameter(100), Parameter(10)], 3, sharded=True)
    assert (buffer.numel, buffer.numel_unpadded) == (384, 110)
    assert buffer.owned == (10 + (128 - 64), 164 - 128, 0)
    assert plan_buffer([Parameter(100), Parameter(10)], 3, sharded=False).owned == (110, 110, 110)


def test_an_embedding_on_two_stages_has_a_bucket_of_its_own() -> None:
    buffer = plan_buffer([Parameter(100, shared_embedding=True), Parameter(10)], 2, sharded=True)
    assert buffer.numel == 128 + 128
    assert buffer.owned == (10 + 64, 36)


def test_a_plan_needs_no_pytorch() -> None:
    program = "import sys, megatron_gspo.memory; sys.exit('torch' in sys.modules or 'megatron.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
