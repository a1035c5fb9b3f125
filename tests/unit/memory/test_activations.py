"""The activations reckoned on paper against the tensors that autograd saves, for a tiny model on the CPU.

The bound is 2%: the formula leaves out what is small against the layers of a real model (the rotary table, segment
bounds, experts' counts), most of all under full recompute. Segments have equal lengths, so that attention's padded batches hold no padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import Qwen3Config, Qwen3MoeConfig

from megatron_gspo.config import ParallelSection
from megatron_gspo.memory.activations import EXPERT_LOAD, Activations, micro_batches_in_flight
from megatron_gspo.memory.shapes import ModelShapes
from megatron_gspo.model.build import build_policy
from megatron_gspo.model.hf_weights import initialize_weights
from megatron_gspo.model.policy import PolicyModel
from tests.tiny_models import dense_config, micro_batch, model_section, moe_config, sequences

BOUND = 0.02
LENGTH, NUM_SEQUENCES = 128, 4
# No two widths alike, so that a term taken for another shows.
SIZES = {"hidden_size": 64, "head_dim": 24, "intermediate_size": 112, "vocab_size": 96, "num_hidden_layers": 3}
CONFIGS = {
    "moe": moe_config(moe_intermediate_size=40, **SIZES),
    "moe and dense layers": moe_config(moe_intermediate_size=40, mlp_only_layers=[1], **SIZES),
    "dense": dense_config(**SIZES),
}


@contextmanager
def saved_bytes(policy: PolicyModel) -> Iterator[dict[int, int]]:
    """Bytes of every storage that autograd saves in the block, by address; parameters are not counted."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    saved: dict[int, int] = {}
    kept: list[torch.Tensor] = []  # so that no other storage takes an address again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
    # Read only now: a checkpointed activation gives its memory up (random.py, CheckpointWithoutOutput).
    storages = [tensor.untyped_storage() for tensor in kept]
    saved.update((storage.data_ptr(), storage.nbytes()) for storage in storages if storage.nbytes())


def built(config: Qwen3Config | Qwen3MoeConfig, dtype: str, recompute: str) -> PolicyModel:
    section = model_section(dtype=dtype, recompute=recompute, log_probs_chunk_tokens=1000)
    (policy,) = build_policy(config, section, ParallelSection())
    initialize_weights([policy], seed=1, initializer_range=0.1)
    return policy


def reckon(config: Qwen3Config | Qwen3MoeConfig, dtype: str, recompute: str) -> Activations:
    shapes = ModelShapes.of(config.to_dict())
    element_bytes = 2 if dtype == "bfloat16" else 4
    return Activations(shapes, ParallelSection(), element_bytes, recompute, LENGTH * NUM_SEQUENCES, cuda=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_forward_pass_keeps_what_is_reckoned(name: str, recompute: str, dtype: str) -> None:
    config = CONFIGS[name]
    policy = built(config, dtype, recompute)
    batch = micro_batch(sequences([LENGTH] * NUM_SEQUENCES, vocabulary=96), prompt_tokens=1)
    with saved_bytes(policy) as saved:
        policy(batch)
    formula = reckon(config, dtype, recompute)
    layers = formula.shapes.moe_layers
    reckoned = sum(formula.layer(is_moe=is_moe) for is_moe in layers) + formula.first_stage() + formula.last_stage()
    assert reckoned == pytest.approx(sum(saved.values()), rel=BOUND)


@pytest.mark.parametrize("name", CONFIGS)
def test_full_recompute_makes_each_layer_anew_in_the_backward_pass(name: str) -> None:
    config = CONFIGS[name]
    policy = built(config, "float32", "full")
    batch = micro_batch(sequences([LENGTH] * NUM_SEQUENCES, vocabulary=96), prompt_tokens=1)
    loss = policy(batch).log_probs.sum()
    with saved_bytes(policy) as saved:
        loss.backward()
    formula = reckon(config, "float32", "full")
    reckoned = sum(formula.recomputed(is_moe=is_moe) for is_moe in formula.shapes.moe_layers)
    assert reckoned == pytest.approx(sum(saved.values()), rel=BOUND)


def test_an_activation_is_kept_for_each_token_a_rank_holds() -> None:
    shapes = ModelShapes.of(CONFIGS["moe"].to_dict())
    whole = Activations(shapes, ParallelSection(), 2, "none", 4096)
    halved = Activations(shapes, ParallelSection(context=2), 2, "full", 4096)
    assert halved.layer_input() * 2 == whole.layer_input() == 4096 * 64 * 2
    quartered = Activations(shapes, ParallelSection(context=2, tensor=2), 2, "full", 4096)
    assert quartered.layer_input() * 4 == whole.layer_input()


def test_experts_get_an_even_share_of_rows_times_a_margin() -> None:
    shapes = ModelShapes.of(CONFIGS["moe"].to_dict())
    rows = [
        Activations(shapes, parallel, 2, "none", 4096).expert_rows
        for parallel in (ParallelSection(), ParallelSection(expert=4), ParallelSection(expert=2, expert_tensor=2))
    ]
    assert rows == [4096 * 2, 4096 * 2 * EXPERT_LOAD, 4096 * 2 * 2 * EXPERT_LOAD]


def test_a_pipeline_stage_holds_its_warm_up_and_one_more() -> None:
    four = ParallelSection(pipeline=4)
    assert [micro_batches_in_flight(four, stage, 100) for stage in range(4)] == [4, 3, 2, 1]
    assert micro_batches_in_flight(four, 0, 2) == 2
    # Interleaved: 2 · (4 - stage - 1) chunks, and 4 for each further chunk a rank has.
    interleaved = ParallelSection(pipeline=4, virtual_pipeline=2)
    assert [micro_batches_in_flight(interleaved, stage, 100) for stage in range(4)] == [11, 9, 7, 5]
    assert micro_batches_in_flight(ParallelSection(), 0, 100) == 1
