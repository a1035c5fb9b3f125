"""What the ranks of test_model_layouts.py run: one update of a checkpoint's model under a parallel layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_gspo import parallel
from megatron_gspo.config import ParallelSection
from megatron_gspo.context_parallel import pad_multiples
from megatron_gspo.model.build import build_policy
from megatron_gspo.model.hf_weights import (
    export_hf_weights,
    initialize_weights,
    load_hf_weights,
    save_hf_checkpoint,
)
from megatron_gspo.model.policy import PolicyModel, TokenLogProbs
from megatron_gspo.types import MicroBatch
from tests.tiny_models import micro_batch, model_section, sequences

#: The responses of all data-parallel ranks together: four micro-batches of two.
LENGTHS = ((9, 5), (4, 12), (7, 7), (3, 11))


def one_update(checkpoint: str, layout: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """Log-probs, gradients, their norm, and the weights before and after an update, by Hugging Face name."""
    sizes = ParallelSection(**layout)
    parallel.initialize_model_parallel(sizes, seed=3)
    chunks = build_policy(Path(checkpoint), model_section(**model), sizes)
    load_hf_weights(chunks, Path(checkpoint))
    loaded = exported(chunks)
    wrapped, optimizer = trainable(chunks, sizes)
    log_probs = forward_and_backward(wrapped, own_micro_batches(sizes))
    for chunk in wrapped:
        assert all(torch.isfinite(buffer.grad_data).all() for buffer in chunk.buffers + chunk.expert_parallel_buffers)
    gradients = None if sizes.distributed_optimizer else exported_gradients(wrapped)
    successful, gradient_norm, _ = optimizer.step()
    assert successful
    return {
        "log_probs": log_probs,
        "loaded": loaded,
        "gradients": gradients,
        "gradient_norm": float(gradient_norm),
        "updated": exported(chunks),
    }


def trainable(chunks: list[PolicyModel], sizes: ParallelSection) -> tuple[list[DistributedDataParallel], Any]:
    """The chunks with Megatron's data-parallel wrapper and optimizer."""
    wrapper = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=sizes.distributed_optimizer, overlap_grad_reduce=False
    )
    wrapped = [
        DistributedDataParallel(chunk.config, wrapper, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    options = OptimizerConfig(
        optimizer="adam",
        lr=1e-2,
        weight_decay=0.0,
        clip_grad=0.5,
        adam_eps=1e-3,  # so that the size of a gradient shows in the update, and not its sign alone
        bf16=chunks[0].config.bf16,
        params_dtype=chunks[0].config.params_dtype,
        use_distributed_optimizer=sizes.distributed_optimizer,
    )
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = sum_gradients
    return wrapped, get_megatron_optimizer(options, wrapped)


def sum_gradients(model: list[torch.nn.Module], num_tokens: torch.Tensor | None = None, **options: Any) -> None:
    """Megatron's reduction without a division by the tokens: the losses have global denominators."""
    del num_tokens
    finalize_model_grads(model, None, **options)


def own_micro_batches(sizes: ParallelSection) -> list[MicroBatch]:
    """This data-parallel rank's part of all micro-batches."""
    per_rank = len(LENGTHS) // parallel.data_size()
    first = parallel.data_rank() * per_rank
    segment, whole = pad_multiples(sizes.tensor, sizes.context)
    return [
        micro_batch(sequences(LENGTHS[index], seed=index), pad_to_multiple=whole, pad_segments_to_multiple=segment)
        for index in range(first, first + per_rank)
    ]


def forward_and_backward(chunks: list[DistributedDataParallel], batches: list[MicroBatch]) -> list[torch.Tensor]:
    """Gradients of a weighted sum of log-probs and entropies; returns the log-probs of each micro-batch."""

    def loss(output: TokenLogProbs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weights = torch.linspace(-1, 1, len(output.log_probs))
        value = (weights * output.log_probs).sum() + 0.1 * output.entropy.sum()
        return value, torch.tensor(len(weights), dtype=torch.int), output.log_probs.detach()

    def step(data: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Any, Any]:
        return model(next(data), temperature=0.8), loss

    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(batches) for _ in chunks],
        model=chunks,
        num_microbatches=len(batches),
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
    )


def exported(chunks: list[PolicyModel]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in export_hf_weights(chunks)}


def exported_gradients(chunks: list[DistributedDataParallel]) -> dict[str, torch.Tensor]:
    """The gradients by Hugging Face name: they take the weights' place while these are exported."""
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    weights = [parameter.data.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.data.copy_(parameter.main_grad)
    gradients = exported([chunk.module for chunk in chunks])
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data.copy_(weight)
    return gradients


def random_weights(checkpoint: str, layout: dict[str, Any], output: str) -> dict[str, torch.Tensor]:
    """Random weights under a layout, also written to `output`."""
    sizes = ParallelSection(**layout)
    parallel.initialize_model_parallel(sizes, seed=3)
    chunks = build_policy(Path(checkpoint), model_section(), sizes)
    initialize_weights(chunks, seed=5, initializer_range=0.1)
    save_hf_checkpoint(chunks, Path(output), Path(checkpoint), shard_bytes=40_000)
    return exported(chunks)
