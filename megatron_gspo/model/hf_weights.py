"""Weights between Hugging Face safetensors and Megatron, both ways, for every parallel layout, a tensor at a time.

In: a checkpoint directory, or the model. Out: the model's parameters filled in place, or Hugging Face tensors one by one
(for a rollout engine), or a checkpoint directory. Each rank reads only its shards from disk, and no direction ever holds
a second copy of the model. What is where stands in `weight_layout`.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_gspo.model.checkpoint_files import CheckpointReader, CheckpointWriter, has_weights
from megatron_gspo.model.policy import PolicyModel
from megatron_gspo.model.weight_layout import (
    EMBEDDING,
    FINAL_NORM,
    OUTPUT,
    Dimensions,
    Sliceable,
    WeightSlot,
    all_slots,
    layer_slots,
)

#: The largest file of a written checkpoint, in bytes.
SHARD_BYTES = 5 * 10**9

__all__ = [
    "export_hf_weights",
    "has_weights",
    "initialize_weights",
    "load_hf_weights",
    "save_hf_checkpoint",
]


def load_hf_weights(chunks: Sequence[PolicyModel], path: Path) -> None:
    """Fill this rank's parameters from the safetensors in `path`, converting to their dtype.

    Optimizers that keep a float32 copy of the parameters must be told (`optimizer.reload_model_params()`).

    Raises:
        UserError: a tensor is missing, surplus, or of another shape, naming it and its file; on every rank alike, and
            before any parameter has changed.
    """
    dimensions = Dimensions.of(chunks[0])
    with CheckpointReader(path) as checkpoint:
        # Files of tied models may hold the output layer once more; it is the embedding.
        ignored = {"lm_head.weight"} if dimensions.tied_embeddings else set()
        checkpoint.check(_expected_shapes(dimensions), ignored)
        _fill(chunks, dimensions, checkpoint.tensor)


def initialize_weights(chunks: Sequence[PolicyModel], *, seed: int, initializer_range: float) -> None:
    """Draw random weights: norms are 1, all else normal with standard deviation `initializer_range`.

    Each tensor has a generator of its own, from `seed` and its name: the model is the same in every parallel layout.
    """
    dimensions = Dimensions.of(chunks[0])
    shapes = _expected_shapes(dimensions)

    def draw(name: str) -> Tensor:
        if len(shapes[name]) == 1:
            return torch.ones(shapes[name])
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.empty(shapes[name]).normal_(std=initializer_range, generator=generator)

    _fill(chunks, dimensions, draw)


def export_hf_weights(chunks: Sequence[PolicyModel]) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the whole model under its Hugging Face name, on every rank, in an order that never changes.

    A collective: all ranks must iterate to the end. Tensors are in the parameters' dtype and on the model's device; they
    may be views of the parameters, so copy what must outlive the next update.
    """
    dimensions = Dimensions.of(chunks[0])
    held = dict(local_weights(chunks, dimensions))
    stage_of_layer = _stage_of_each_layer(chunks)
    like, groups = next(iter(held.values())), _Groups.of_this_rank()
    for slot in all_slots(dimensions):
        whole = _whole(slot, held.get(slot), _stage(slot, stage_of_layer), dimensions, like, groups)
        yield from zip(slot.names, whole, strict=True)


def save_hf_checkpoint(
    chunks: Sequence[PolicyModel], path: Path, template: Path, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a checkpoint that Transformers and SGLang load. A collective; on return it is complete.

    Configuration and tokenizer are copied from `template`, a checkpoint directory of the same model. Files are written
    aside and renamed, the one that makes them a checkpoint last; weights that were in `path` are replaced.
    """
    dimensions = Dimensions.of(chunks[0])
    dtype = chunks[0].config.params_dtype
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in _expected_shapes(dimensions).items()}
    writer = CheckpointWriter(path, template, sizes, dtype, shard_bytes) if dist.get_rank() == 0 else None
    for name, tensor in export_hf_weights(chunks):
        if writer is not None:
            writer.add(name, tensor)
    if writer is not None:
        writer.finish()
    dist.barrier()


def local_weights(chunks: Sequence[PolicyModel], dimensions: Dimensions) -> Iterator[tuple[WeightSlot, Tensor]]:
    """Each slot that this rank holds (a shard of), and the parameter or the part of a parameter it lies in."""
    experts = _local_experts(dimensions)
    for chunk in chunks:
        parameters = {name: parameter.detach() for name, parameter in chunk.named_parameters()}
        layers = tuple(module.layer_number - 1 for module in chunk.decoder.layers)
        places = _places(tuple(parameters), layers, chunk.pre_process, chunk.post_process, dimensions, experts)
        stacks = {name: parameters[name].unbind() for name, expert in places.values() if expert == 0}
        for slot, (name, expert) in places.items():
            yield slot, parameters[name] if expert is None else stacks[name][expert]


def _expected_shapes(dimensions: Dimensions) -> dict[str, tuple[int, ...]]:
    """The shape of every Hugging Face tensor of the model, by name, in the order of export."""
    return {
        name: shape
        for slot in all_slots(dimensions)
        for name, shape in zip(slot.names, slot.shapes(dimensions), strict=True)
    }


def _fill(chunks: Sequence[PolicyModel], dimensions: Dimensions, source: Callable[[str], Sliceable]) -> None:
    for slot, weight in local_weights(chunks, dimensions):
        group = _tensor_group(slot)
        parts = [source(name) for name in slot.names]
        weight.copy_(slot.kind.sharding.split(parts, dimensions, group.rank(), group.size()))


class _Place(NamedTuple):
    """Where in a chunk a slot lies."""

    parameter: str
    expert: int | None  # of the rank, in a parameter that stacks its experts


@functools.lru_cache(maxsize=16)  # asked for at every hand-over, and the same where all arguments are
def _places(
    parameters: tuple[str, ...],
    layers: tuple[int, ...],
    is_first: bool,
    is_last: bool,
    dimensions: Dimensions,
    experts: range,
) -> dict[WeightSlot, _Place]:
    """The slots of a chunk with these `parameters` and `layers`, on the rank of these `experts`, and where they lie."""
    names = frozenset(parameters)
    places = {
        slot: _find(slot, names, local_layer, slot.expert - experts.start)
        for slot, local_layer in _chunk_slots(layers, is_first, is_last, dimensions, experts)
    }
    unclaimed = names - {place.parameter for place in places.values()}
    assert not unclaimed, f"parameters without a Hugging Face name: {sorted(unclaimed)}"
    return places


def _chunk_slots(
    layers: tuple[int, ...], is_first: bool, is_last: bool, dimensions: Dimensions, experts: range
) -> Iterator[tuple[WeightSlot, int]]:
    """The slots of one chunk, each with the number of its layer in the chunk."""
    if is_first or (is_last and dimensions.tied_embeddings):
        yield WeightSlot(EMBEDDING), 0
    for local_layer, layer in enumerate(layers):
        for slot in layer_slots(layer, is_moe=dimensions.moe_layers[layer], experts=experts):
            yield slot, local_layer
    if is_last:
        yield WeightSlot(FINAL_NORM), 0
        if not dimensions.tied_embeddings:
            yield WeightSlot(OUTPUT), 0


class _Group(NamedTuple):
    """A process group and this rank's place in it, looked up once: at a few megabytes a tensor, asking costs as well."""

    ranks: dist.ProcessGroup
    size: int
    rank: int

    @classmethod
    def of(cls, ranks: dist.ProcessGroup) -> _Group:
        return cls(ranks, ranks.size(), ranks.rank())


class _Groups(NamedTuple):
    """The groups that this rank's part of the weights is shared among."""

    pipeline: _Group
    expert: _Group
    tensor: _Group
    expert_tensor: _Group

    @classmethod
    def of_this_rank(cls) -> _Groups:
        return cls(
            pipeline=_Group.of(parallel_state.get_pipeline_model_parallel_group()),
            expert=_Group.of(parallel_state.get_expert_model_parallel_group()),
            tensor=_Group.of(parallel_state.get_tensor_model_parallel_group()),
            expert_tensor=_Group.of(parallel_state.get_expert_tensor_parallel_group()),
        )


def _find(slot: WeightSlot, parameters: frozenset[str], layer: int, expert: int) -> _Place:
    for template in slot.kind.megatron:
        name, _, index = template.format(layer=layer, expert=expert).partition("[")
        if name in parameters:
            return _Place(name, int(index.rstrip("]")) if index else None)
    raise AssertionError(f"the model has no parameter for {slot.names}")


def _whole(
    slot: WeightSlot, shard: Tensor | None, stage: int, dimensions: Dimensions, like: Tensor, groups: _Groups
) -> tuple[Tensor, ...]:
    """The slot's Hugging Face tensors on every rank: joined where it is held, then handed to the other ranks."""
    tensors: tuple[Tensor, ...] | None = None
    if groups.pipeline.rank == stage:
        if shard is not None:
            tensor_group = groups.expert_tensor if slot.kind.is_expert else groups.tensor
            whole = slot.kind.sharding.merge(_all_shards(shard, tensor_group), dimensions)
            tensors = tuple(tensor.contiguous() for tensor in whole)
        if slot.kind.is_expert and groups.expert.size > 1:
            holder = slot.expert // (dimensions.experts // groups.expert.size)
            tensors = _broadcast(tensors, groups.expert, holder, slot, dimensions, like)
    return _broadcast(tensors, groups.pipeline, stage, slot, dimensions, like)


def _all_shards(shard: Tensor, group: _Group) -> list[Tensor]:
    if group.size == 1:
        return [shard]
    shard = shard.contiguous()
    shards = [torch.empty_like(shard) for _ in range(group.size)]
    dist.all_gather(shards, shard, group=group.ranks)
    return shards


def _broadcast(
    tensors: tuple[Tensor, ...] | None,
    group: _Group,
    holder: int,
    slot: WeightSlot,
    dimensions: Dimensions,
    like: Tensor,
) -> tuple[Tensor, ...]:
    """The slot's tensors of the rank `holder` of `group` on all of its ranks; `like` has their dtype and device."""
    if group.size > 1:
        if group.rank != holder:
            tensors = tuple(like.new_empty(shape) for shape in slot.shapes(dimensions))
        assert tensors is not None
        for tensor in tensors:
            dist.broadcast(tensor, group=group.ranks, group_src=holder)
    assert tensors is not None, "the holder has the tensors"
    return tensors


def _stage_of_each_layer(chunks: Sequence[PolicyModel]) -> dict[int, int]:
    """The pipeline stage that holds each layer of the model."""
    group = parallel_state.get_pipeline_model_parallel_group()
    held = [module.layer_number - 1 for chunk in chunks for module in chunk.decoder.layers]
    layers: list[list[int]] = [held] * group.size()
    if group.size() > 1:
        dist.all_gather_object(layers, held, group=group)
    return {layer: stage for stage, numbers in enumerate(layers) for layer in numbers}


def _stage(slot: WeightSlot, stage_of_layer: dict[int, int]) -> int:
    if slot.is_in_layer:
        return stage_of_layer[slot.layer]
    return 0 if slot.kind is EMBEDDING else parallel_state.get_pipeline_model_parallel_world_size() - 1


def _tensor_group(slot: WeightSlot) -> dist.ProcessGroup:
    """The ranks that share one slot's tensors among them."""
    if slot.kind.is_expert:
        return parallel_state.get_expert_tensor_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()


def _local_experts(dimensions: Dimensions) -> range:
    """The experts of this rank."""
    count = dimensions.experts // parallel_state.get_expert_model_parallel_world_size()
    first = parallel_state.get_expert_model_parallel_rank() * count
    return range(first, first + count)
