"""Every weight of the model: what Hugging Face calls it, where Megatron keeps it, and how Megatron splits it.

One table, read in both directions: loading takes this rank's shard out of Hugging Face tensors, exporting joins all
ranks' shards into them. A `WeightSlot` is one entry for one layer (and expert): the smallest unit that moves. Megatron
joins some Hugging Face tensors into one (query, key and value; gate and up), so a slot may have several names.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron_gspo.model.layer_spec import is_moe_layer
from megatron_gspo.model.policy import PolicyModel


@dataclass(frozen=True)
class Dimensions:
    """The sizes of the whole model, by the names the table uses."""

    vocabulary: int
    hidden: int
    head: int
    query: int  # all query heads together
    key_value: int  # all key (or value) heads together
    query_groups: int  # key-value heads
    mlp: int
    experts: int
    expert_mlp: int
    moe_layers: tuple[bool, ...]  # one a layer
    tied_embeddings: bool

    @classmethod
    def of(cls, model: PolicyModel) -> Dimensions:
        """The sizes of the model that `model` is a chunk of."""
        config = model.config
        return cls(
            vocabulary=model.vocab_size,
            hidden=config.hidden_size,
            head=config.kv_channels,
            query=config.kv_channels * config.num_attention_heads,
            key_value=config.kv_channels * config.num_query_groups,
            query_groups=config.num_query_groups,
            mlp=config.ffn_hidden_size,
            experts=config.num_moe_experts or 0,
            expert_mlp=config.moe_ffn_hidden_size or 0,
            moe_layers=tuple(is_moe_layer(config, layer) for layer in range(config.num_layers)),
            tied_embeddings=model.share_embeddings_and_output_weights,
        )


class Sliceable(Protocol):
    """A tensor, or a tensor on disk of which only the part asked for is read."""

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor: ...


class Sharding(Protocol):
    """How tensor-parallel ranks split a slot's Hugging Face tensors, and join them again."""

    def split(self, parts: Sequence[Sliceable], dimensions: Dimensions, rank: int, num_ranks: int) -> Tensor:
        """Rank `rank`'s shard as Megatron keeps it, from whole tensors."""
        ...

    def merge(self, shards: Sequence[Tensor], dimensions: Dimensions) -> tuple[Tensor, ...]:
        """The whole tensors, from every rank's shard in rank order; views of a single shard where that is possible."""
        ...


class Replicated:
    """Every rank has all of it."""

    def split(self, parts: Sequence[Sliceable], dimensions: Dimensions, rank: int, num_ranks: int) -> Tensor:
        """All of it."""
        del dimensions, rank, num_ranks
        return parts[0][:]

    def merge(self, shards: Sequence[Tensor], dimensions: Dimensions) -> tuple[Tensor, ...]:
        """Any of them."""
        del dimensions
        return (shards[0],)


@dataclass(frozen=True)
class Split:
    """Cut evenly: outputs (dimension 0) of a column-parallel layer, inputs (dimension 1) of a row-parallel one."""

    dimension: Literal[0, 1]
    size: str  # which of `Dimensions` is cut

    def split(self, parts: Sequence[Sliceable], dimensions: Dimensions, rank: int, num_ranks: int) -> Tensor:
        """The rank's even share."""
        share = getattr(dimensions, self.size) // num_ranks
        cut = slice(rank * share, (rank + 1) * share)
        return parts[0][cut] if self.dimension == 0 else parts[0][:, cut]

    def merge(self, shards: Sequence[Tensor], dimensions: Dimensions) -> tuple[Tensor, ...]:
        """End to end."""
        del dimensions
        return (_join(shards, self.dimension),)


@dataclass(frozen=True)
class GateAndUp:
    """A gated MLP's first layer: the rank's gate rows above its up rows."""

    size: str

    def split(self, parts: Sequence[Sliceable], dimensions: Dimensions, rank: int, num_ranks: int) -> Tensor:
        """The rank's share of both."""
        share = getattr(dimensions, self.size) // num_ranks
        cut = slice(rank * share, (rank + 1) * share)
        return torch.cat([part[cut] for part in parts])

    def merge(self, shards: Sequence[Tensor], dimensions: Dimensions) -> tuple[Tensor, ...]:
        """All gates, all ups."""
        del dimensions
        if len(shards) == 1:  # as it mostly is, and of this there is one an expert
            return shards[0].chunk(2)
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return _join(gates, 0), _join(ups, 0)


class QueryKeyValue:
    """Attention's input layer: for each query group in turn its query heads, its key head, its value head."""

    def split(self, parts: Sequence[Sliceable], dimensions: Dimensions, rank: int, num_ranks: int) -> Tensor:
        """The query groups of the rank; with more ranks than groups, an even share of a group's rows."""
        if num_ranks > dimensions.query_groups:
            return self.split(parts, dimensions, 0, 1).chunk(num_ranks)[rank]
        num_groups = dimensions.query_groups // num_ranks
        grouped = []
        for part, size in zip(parts, (dimensions.query, dimensions.key_value, dimensions.key_value), strict=True):
            share = size // num_ranks
            rows = part[rank * share : (rank + 1) * share]
            grouped.append(rows.unflatten(0, (num_groups, -1)))
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def merge(self, shards: Sequence[Tensor], dimensions: Dimensions) -> tuple[Tensor, ...]:
        """The heads of all groups, sorted into queries, keys and values."""
        grouped = _join(shards, 0).unflatten(0, (dimensions.query_groups, -1))
        query_rows = dimensions.query // dimensions.query_groups
        parts = grouped.split([query_rows, dimensions.head, dimensions.head], dim=1)
        return tuple(part.flatten(0, 1) for part in parts)


@dataclass(frozen=True, eq=False)  # each is one of those below, so slots compare and hash by identity
class WeightKind:
    """A row of the table. `{layer}` counts the model's layers, and `{expert}` its experts, in both columns of names.

    In Megatron's names they count those of the chunk and of the rank; `name[{expert}]` is an index into a parameter that
    stacks experts. A kind has one name there a set of modules: Transformer Engine's fused ones differ.
    """

    hugging_face: tuple[str, ...]
    shapes: tuple[tuple[str, ...], ...]  # of each Hugging Face tensor, in names of `Dimensions`
    megatron: tuple[str, ...]
    sharding: Sharding
    is_expert: bool = False


_IN_LAYER = "model.layers.{layer}."
_LAYER = "decoder.layers.{layer}."

EMBEDDING = WeightKind(
    ("model.embed_tokens.weight",),
    (("vocabulary", "hidden"),),
    # With tied embeddings the last pipeline stage keeps a copy under the second name.
    ("embedding.word_embeddings.weight", "output_layer.weight"),
    Split(0, "vocabulary"),
)
FINAL_NORM = WeightKind(("model.norm.weight",), (("hidden",),), ("decoder.final_layernorm.weight",), Replicated())
OUTPUT = WeightKind(("lm_head.weight",), (("vocabulary", "hidden"),), ("output_layer.weight",), Split(0, "vocabulary"))

ATTENTION = (
    WeightKind(
        (_IN_LAYER + "input_layernorm.weight",),
        (("hidden",),),
        (_LAYER + "input_layernorm.weight", _LAYER + "self_attention.linear_qkv.layer_norm_weight"),
        Replicated(),
    ),
    WeightKind(
        tuple(f"{_IN_LAYER}self_attn.{name}_proj.weight" for name in "qkv"),
        (("query", "hidden"), ("key_value", "hidden"), ("key_value", "hidden")),
        (_LAYER + "self_attention.linear_qkv.weight",),
        QueryKeyValue(),
    ),
    WeightKind(
        (_IN_LAYER + "self_attn.q_norm.weight",),
        (("head",),),
        (_LAYER + "self_attention.q_layernorm.weight",),
        Replicated(),
    ),
    WeightKind(
        (_IN_LAYER + "self_attn.k_norm.weight",),
        (("head",),),
        (_LAYER + "self_attention.k_layernorm.weight",),
        Replicated(),
    ),
    WeightKind(
        (_IN_LAYER + "self_attn.o_proj.weight",),
        (("hidden", "query"),),
        (_LAYER + "self_attention.linear_proj.weight",),
        Split(1, "query"),
    ),
    WeightKind(
        (_IN_LAYER + "post_attention_layernorm.weight",),
        (("hidden",),),
        (_LAYER + "pre_mlp_layernorm.weight", _LAYER + "mlp.linear_fc1.layer_norm_weight"),
        Replicated(),
    ),
)

DENSE_MLP = (
    WeightKind(
        (_IN_LAYER + "mlp.gate_proj.weight", _IN_LAYER + "mlp.up_proj.weight"),
        (("mlp", "hidden"), ("mlp", "hidden")),
        (_LAYER + "mlp.linear_fc1.weight",),
        GateAndUp("mlp"),
    ),
    WeightKind(
        (_IN_LAYER + "mlp.down_proj.weight",),
        (("hidden", "mlp"),),
        (_LAYER + "mlp.linear_fc2.weight",),
        Split(1, "mlp"),
    ),
)

ROUTER = WeightKind(
    (_IN_LAYER + "mlp.gate.weight",), (("experts", "hidden"),), (_LAYER + "mlp.router.weight",), Replicated()
)

_EXPERT = _IN_LAYER + "mlp.experts.{expert}."
EXPERT_MLP = (
    WeightKind(
        (_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight"),
        (("expert_mlp", "hidden"), ("expert_mlp", "hidden")),
        (_LAYER + "mlp.experts.weight1[{expert}]", _LAYER + "mlp.experts.linear_fc1.weight{expert}"),
        GateAndUp("expert_mlp"),
        is_expert=True,
    ),
    WeightKind(
        (_EXPERT + "down_proj.weight",),
        (("hidden", "expert_mlp"),),
        (_LAYER + "mlp.experts.weight2[{expert}]", _LAYER + "mlp.experts.linear_fc2.weight{expert}"),
        Split(1, "expert_mlp"),
        is_expert=True,
    ),
)


@dataclass(frozen=True)
class WeightSlot:
    """One kind of weight in one place of the whole model."""

    kind: WeightKind
    layer: int = 0  # 0 where the kind is not in a layer
    expert: int = 0  # 0 where it is not an expert's

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The Hugging Face names."""
        return tuple(name.format(layer=self.layer, expert=self.expert) for name in self.kind.hugging_face)

    @functools.cached_property
    def is_in_layer(self) -> bool:
        """Whether `layer` means something."""
        return self.kind.hugging_face[0].startswith(_IN_LAYER)

    def shapes(self, dimensions: Dimensions) -> tuple[tuple[int, ...], ...]:
        """The shapes of the Hugging Face tensors."""
        return tuple(tuple(getattr(dimensions, size) for size in shape) for shape in self.kind.shapes)


@functools.lru_cache(maxsize=4)  # asked for at every hand-over; the slots keep their names
def all_slots(dimensions: Dimensions) -> tuple[WeightSlot, ...]:
    """Every weight of the whole model, in the order in which they are exported."""
    slots = [WeightSlot(EMBEDDING)]
    for layer, is_moe in enumerate(dimensions.moe_layers):
        slots.extend(layer_slots(layer, is_moe=is_moe, experts=range(dimensions.experts)))
    slots.append(WeightSlot(FINAL_NORM))
    if not dimensions.tied_embeddings:
        slots.append(WeightSlot(OUTPUT))
    return tuple(slots)


def layer_slots(layer: int, *, is_moe: bool, experts: range) -> Iterator[WeightSlot]:
    """The weights of one layer, with those of `experts` if it has any."""
    for kind in (*ATTENTION, *((ROUTER,) if is_moe else DENSE_MLP)):
        yield WeightSlot(kind, layer)
    for kind in EXPERT_MLP if is_moe else ():
        for expert in experts:  # one after the other, as a parameter that stacks them holds them
            yield WeightSlot(kind, layer, expert)


def _join(shards: Sequence[Tensor], dimension: int) -> Tensor:
    return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim=dimension)
