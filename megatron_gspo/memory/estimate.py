"""A recipe's memory on the rank that needs most of it.

In: a recipe. Out: a `MemoryEstimate`: for every pipeline stage the parts of its fullest rank, in bytes. Lengths are at
their limits throughout: every prompt and response as long as the recipe allows, every token one of a response. Tokens
reach their experts by `alltoall`, whatever `parallel.dispatcher` is.

What stays all the time is added up. Of what comes and goes (the forward and backward passes with their logits, the
weights' way to the rollout engine, sampling by the local engine) only the largest counts. Adam updates in place.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_gspo.config import ParallelSection, Recipe
from megatron_gspo.memory.activations import FLOAT32, INT64, Activations, micro_batches_in_flight
from megatron_gspo.memory.buffers import plan_buffer
from megatron_gspo.memory.shapes import ModelShapes, chunk_layers, chunk_parameters

GIB = 2**30

#: Taken on a GPU by CUDA's context, NCCL's buffers and the allocator's gaps. An assumption, not a measurement.
RESERVED_BYTES = 4 * GIB

#: Parts of which only the largest counts, because they are never there at the same time.
PHASES = {
    "forward and backward": ("activations", "log-prob logits"),
    "weight sync": ("weight export",),
    "rollout": ("local engine's cache",),
}


@dataclass(frozen=True)
class RankMemory:
    """The fullest rank of one pipeline stage."""

    stage: int
    holds: str  # "embedding", "output layer", both, or ""
    parts: Mapping[str, int]  # bytes, by what takes them

    @property
    def peak_phase(self) -> str:
        """The phase that takes most."""
        return max(PHASES, key=self._phase_bytes)

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        passing = {part for parts in PHASES.values() for part in parts}
        stays = sum(size for part, size in self.parts.items() if part not in passing)
        return stays + self._phase_bytes(self.peak_phase)

    def is_at_peak(self, part: str) -> bool:
        """Whether a part is among those that make up `total`."""
        return part in PHASES[self.peak_phase] or not any(part in parts for parts in PHASES.values())

    def _phase_bytes(self, phase: str) -> int:
        return sum(self.parts.get(part, 0) for part in PHASES[phase])


@dataclass(frozen=True)
class MemoryEstimate:
    """What a recipe takes, one entry a pipeline stage."""

    stages: tuple[RankMemory, ...]

    @property
    def worst(self) -> RankMemory:
        """The rank that needs most; of equals the first."""
        return max(self.stages, key=lambda rank: rank.total)

    @property
    def total_gib(self) -> float:
        """GiB on that rank."""
        return self.worst.total / GIB

    @property
    def parts_gib(self) -> dict[str, float]:
        """Its parts in GiB; of those that are not there at the peak see `RankMemory.is_at_peak`."""
        return {part: size / GIB for part, size in self.worst.parts.items()}

    def fits(self, gib: float) -> bool:
        """Whether a GPU of `gib` GiB is enough."""
        return self.total_gib <= gib


@dataclass(frozen=True)
class StaticMemory:
    """What one stage's ranks hold whatever the batch, in elements or bytes."""

    parameters: int  # bytes, padding included
    gradients: int  # bytes, padding included
    optimizer: int  # bytes, on the data-parallel rank with most
    numel: int  # elements of the parameters without padding


def estimate(recipe: Recipe) -> MemoryEstimate:
    """What `recipe` takes on its ranks; `load_recipe` has checked it against the model it names.

    `parallel.data` is the recipe's own: set it to what the launcher will leave, where that is another number.
    """
    shapes = ModelShapes.read(recipe.model.path)
    return MemoryEstimate(tuple(_stage(recipe, shapes, stage) for stage in range(recipe.parallel.pipeline)))


@functools.lru_cache(maxsize=4096)
def static_memory(
    shapes: ModelShapes, parallel: ParallelSection, element_bytes: int, stage: int, data_ranks: tuple[int, int] | None
) -> StaticMemory:
    """Parameters, gradients and optimizer states of one stage.

    Args:
        data_ranks: this rank's place in the data-parallel (with context-parallel) group and in the experts' one; None
            for the worst, which is at most what the fullest shares of both groups make.
    """
    dense_ranks = parallel.data * parallel.context
    expert_ranks = parallel.world_size // parallel.expert_model_size
    padded = owned = numel = 0
    for chunk in range(parallel.virtual_pipeline or 1):
        parameters = chunk_parameters(shapes, parallel, stage, chunk)
        for is_expert, num_ranks in ((False, dense_ranks), (True, expert_ranks)):
            of_group = [parameter for parameter in parameters if parameter.is_expert == is_expert]
            buffer = plan_buffer(of_group, num_ranks, sharded=parallel.distributed_optimizer)
            padded, numel = padded + buffer.numel, numel + buffer.numel_unpadded
            owned += max(buffer.owned) if data_ranks is None else buffer.owned[data_ranks[is_expert]]
    # Adam's two moments, and the float32 weights that a bfloat16 model is updated through.
    states = 2 * FLOAT32 + (FLOAT32 if element_bytes < FLOAT32 else 0)
    return StaticMemory(
        parameters=padded * element_bytes,
        gradients=padded * FLOAT32,
        optimizer=owned * states,
        numel=numel,
    )


def _stage(recipe: Recipe, shapes: ModelShapes, stage: int) -> RankMemory:
    parallel, b = recipe.parallel, 2 if recipe.model.dtype == "bfloat16" else FLOAT32
    static = static_memory(shapes, _with_expert_tensor(parallel), b, stage, None)
    is_first, is_last = stage == 0, stage == parallel.pipeline - 1
    parts = {
        "parameters": static.parameters,
        "gradients": static.gradients,
        "optimizer states": static.optimizer,
        "reference policy": static.numel * b if recipe.objective.kl_coefficient > 0 else 0,
        "activations": _activations(recipe, shapes, stage, b),
        "log-prob logits": _logits(recipe, shapes, b) if is_last else 0,
        "routing cache": _routing_cache(recipe, shapes, stage),
        "micro-batches of a step": _step_tokens(recipe) * _BYTES_PER_TOKEN,
        "weight export": _weight_export(parallel, shapes, b),
        "local engine": shapes.num_parameters * b if recipe.rollout.engine == "local" else 0,
        "local engine's cache": _engine_cache(recipe, shapes, b),
        "CUDA, NCCL, gaps (assumed)": RESERVED_BYTES,
    }
    holds = " and ".join(name for name, here in (("embedding", is_first), ("output layer", is_last)) if here)
    return RankMemory(stage, holds, {part: size for part, size in parts.items() if size})


#: data/packing.py: token ids, positions and, of response tokens, position and target in int64; the old policy's and the
#: engine's log-probs in float32; whether a token is a sample's.
_BYTES_PER_TOKEN = 4 * INT64 + 2 * FLOAT32 + 1


def _activations(recipe: Recipe, shapes: ModelShapes, stage: int, element_bytes: int) -> int:
    parallel = recipe.parallel
    tokens = max(recipe.training.tokens_per_micro_batch, _response_tokens(recipe))
    kept = Activations(shapes, parallel, element_bytes, recipe.model.recompute, tokens)
    chunks = parallel.virtual_pipeline or 1
    layers = [
        shapes.moe_layers[layer]
        for chunk in range(chunks)
        for layer in chunk_layers(len(shapes.moe_layers), parallel, stage, chunk)
    ]
    of_layers = sum(kept.layer(is_moe=is_moe) for is_moe in layers)
    in_flight = micro_batches_in_flight(parallel, stage, _most_micro_batches(recipe))
    working = max(kept.recomputed(is_moe=is_moe) + kept.passing(is_moe=is_moe) for is_moe in set(layers))
    ends = (kept.first_stage() if stage == 0 else 0) + (kept.last_stage() if stage == parallel.pipeline - 1 else 0)
    return of_layers * in_flight // chunks + working + ends


def _logits(recipe: Recipe, shapes: ModelShapes, element_bytes: int) -> int:
    """log_probs.py, backward: log p and p of a chunk and their gradient in the model's dtype; then, without a chunk, what
    stands for the weight's gradient. (That itself is among the gradients already.)"""
    rows = shapes.vocabulary // recipe.parallel.tensor
    chunk = recipe.model.log_probs_chunk_tokens * rows * (2 * FLOAT32 + element_bytes)
    return max(chunk, rows * shapes.hidden * element_bytes)


def _routing_cache(recipe: Recipe, shapes: ModelShapes, stage: int) -> int:
    """routing/record.py and training/routing.py: one or two bytes an expert; margins in float32 where volatility is
    measured; under R3 the engine's routes beside the trainer's; and those of the mini-batch being compared."""
    routing, parallel = recipe.routing, recipe.parallel
    if routing.routes_on_host or not any(shapes.moe_layers):
        return 0
    chunks = range(parallel.virtual_pipeline or 1)
    num_layers = sum(
        shapes.moe_layers[layer]
        for chunk in chunks
        for layer in chunk_layers(len(shapes.moe_layers), parallel, stage, chunk)
    )
    routes = shapes.top_k * (1 if shapes.experts <= 256 else 2)
    recorded = recipe.rollout.old_log_probs == "trainer" and (routing.replay == "r2" or routing.measure)
    margins = FLOAT32 if recorded and routing.measure else 0
    of_update = routes / recipe.training.mini_batches if routing.measure else 0
    per_token_layer = routes * (recorded + (routing.replay == "r3")) + margins + of_update
    return int(_step_tokens(recipe) / (parallel.tensor * parallel.context) * num_layers * per_token_layer)


def _weight_export(parallel: ParallelSection, shapes: ModelShapes, element_bytes: int) -> int:
    """hf_weights.py: one tensor of the whole model at a time, the largest the embedding: its shards and the whole, or on
    the ranks of other stages the whole alone."""
    whole = shapes.vocabulary * shapes.hidden * element_bytes
    if parallel.tensor > 1:
        return 2 * whole
    return whole if parallel.pipeline > 1 else 0


def _engine_cache(recipe: Recipe, shapes: ModelShapes, element_bytes: int) -> int:
    """rollout/kv_cache.py: keys and values, whose room doubles when it runs out."""
    if recipe.rollout.engine != "local":
        return 0
    rows = min(recipe.rollout.max_concurrent_responses, _step_responses(recipe))
    per_token = 2 * shapes.key_value * element_bytes * len(shapes.moe_layers)
    return 2 * rows * _response_tokens(recipe) * per_token


def _response_tokens(recipe: Recipe) -> int:
    """The longest prompt with the longest response."""
    return recipe.max_sequence_tokens


def _step_responses(recipe: Recipe) -> int:
    """Of one replica."""
    return recipe.training.prompts_per_step * recipe.rollout.responses_per_prompt // recipe.parallel.data


def _step_tokens(recipe: Recipe) -> int:
    """Of one replica."""
    return _step_responses(recipe) * _response_tokens(recipe)


def _most_micro_batches(recipe: Recipe) -> int:
    """Of a mini-batch, on one replica: a micro-batch holds at least one response."""
    return max(1, _step_responses(recipe) // recipe.training.mini_batches)


def _with_expert_tensor(parallel: ParallelSection) -> ParallelSection:
    """The same layout, equal for the cache however the experts' tensor size was given."""
    return parallel.model_copy(update={"expert_tensor": parallel.expert_tensor_size})
