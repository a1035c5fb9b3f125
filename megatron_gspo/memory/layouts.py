"""The layouts a number of GPUs allows, best first.

In: a recipe, a number of GPUs, their memory. Out: every tensor / expert / expert_tensor / pipeline / context / data split
that the recipe's own checks accept, and the first of them that fit. Nothing else of the recipe changes.

The order is that of what a layout costs in communication and idle time, on nodes of so many GPUs: tensor groups within a
node before those across nodes; then expert groups (expert × expert_tensor) within a node; then the shortest pipeline;
the least context parallelism; the least expert_tensor; the smallest tensor; the smallest expert. What remains are data
replicas, so that an earlier layout has more of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_gspo.config import ParallelSection, Recipe, check_recipe, check_recipe_against_model
from megatron_gspo.config.layout_fit import row_refusals
from megatron_gspo.memory.estimate import MemoryEstimate, estimate


@dataclass(frozen=True)
class Layout:
    """One way to divide a recipe over the GPUs, and what it takes."""

    parallel: ParallelSection
    memory: MemoryEstimate

    def overrides(self) -> str:
        """As arguments of the command line."""
        sizes = ("tensor", "expert", "expert_tensor", "pipeline", "context", "data")
        values = {size: getattr(self.parallel, size) for size in (*sizes, "virtual_pipeline")}
        if self.parallel.virtual_pipeline is None:
            del values["virtual_pipeline"]
        return " ".join(f"parallel.{size}={'null' if value is None else value}" for size, value in values.items())


def possible_layouts(recipe: Recipe, num_gpus: int, gpus_per_node: int) -> list[Recipe]:
    """The recipe under every split of `num_gpus` that its checks accept, best first.

    There is always one: context parallelism over all of them.
    """
    hf_config = json.loads((recipe.model.path / "config.json").read_text(encoding="utf-8"))
    splits = _splits(recipe.parallel, num_gpus, has_experts=hf_config["model_type"] == "qwen3_moe")
    recipes = [recipe.model_copy(update={"parallel": sizes}) for sizes in splits]
    accepted = [
        candidate
        for candidate in recipes
        if not check_recipe(candidate)
        and not check_recipe_against_model(candidate, hf_config)
        and _experts_are_aligned(candidate, hf_config)
    ]

    def cost(candidate: Recipe) -> tuple[int | bool, ...]:
        parallel = candidate.parallel
        expert_group = parallel.expert * parallel.expert_tensor_size
        return (
            parallel.tensor > gpus_per_node,
            expert_group > gpus_per_node,
            parallel.pipeline,
            parallel.context,
            parallel.expert_tensor_size,
            parallel.tensor,
            parallel.expert,
        )

    return sorted(accepted, key=cost)


def fitting_layouts(recipes: list[Recipe], gib: float, most: int) -> list[Layout]:
    """The first `most` of `recipes` (from `possible_layouts`) that fit GPUs of `gib` GiB."""
    found: list[Layout] = []
    for recipe in recipes:
        memory = estimate(recipe)
        if memory.fits(gib):
            found.append(Layout(recipe.parallel, memory))
        if len(found) == most:
            break
    return found


def smallest_layout(recipes: list[Recipe]) -> Layout:
    """The one that needs least: what to say where none fits."""
    return min((Layout(recipe.parallel, estimate(recipe)) for recipe in recipes), key=lambda it: it.memory.total_gib)


def _experts_are_aligned(recipe: Recipe, hf_config: Mapping[str, Any]) -> bool:
    """Whether the grouped products of the layers without Transformer Engine take experts this narrow."""
    return recipe.model.spec == "transformer_engine" or not any(row_refusals(recipe.model, recipe.parallel, hf_config))


def _splits(given: ParallelSection, num_gpus: int, *, has_experts: bool) -> Iterator[ParallelSection]:
    for pipeline in _divisors(num_gpus):
        of_stage = num_gpus // pipeline
        # A pipeline keeps the recipe's virtual stages; the checks say where they do not divide the layers.
        virtual = given.virtual_pipeline if pipeline > 1 else None
        experts: list[tuple[int, int | None]] = [(1, None)]
        if has_experts:
            experts = [(size, width) for size in _divisors(of_stage) for width in _divisors(of_stage // size)]
        for tensor in _divisors(of_stage):
            for context in _divisors(of_stage // tensor):
                sizes = {
                    "tensor": tensor,
                    "pipeline": pipeline,
                    "virtual_pipeline": virtual,
                    "context": context,
                    "data": of_stage // (tensor * context),
                }
                for expert, expert_tensor in experts:
                    yield given.model_copy(update=sizes | {"expert": expert, "expert_tensor": expert_tensor})


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
