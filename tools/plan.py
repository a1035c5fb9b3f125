"""What a recipe takes of a GPU's memory, whether it fits, and the layouts that do.

    python tools/plan.py RECIPE [section.field=value ...] --gpus N --gpu-memory GIB [--gpus-per-node 8] [--json]

Needs no GPU, no Megatron-Core and no ranks: figures follow from the recipe and the model's config.json
(`megatron_gspo.memory`; docs/scale.md says what is exact and what is an estimate). The table is of the recipe's own
layout, with as many data-parallel replicas as the GPUs make. Exit status: 0 it fits; 1 it does not; 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from megatron_gspo.config import ParallelSection, Recipe, load_recipe, recipe_for_world_size
from megatron_gspo.memory import GIB, Layout, MemoryEstimate, estimate, fitting_layouts, possible_layouts
from megatron_gspo.memory.layouts import smallest_layout
from megatron_gspo.types import UserError

MOST_LAYOUTS = 10


def main() -> int:
    """Plan, print, and return the exit status."""
    arguments = _parser().parse_intermixed_args()
    try:
        for name in ("gpus", "gpu_memory", "gpus_per_node"):
            if getattr(arguments, name) <= 0:
                raise UserError(
                    f"--{name.replace('_', '-')} is {getattr(arguments, name):g}; accepted: a number above 0"
                )
        given = load_recipe(arguments.recipe, arguments.overrides)
        # What does not divide the GPUs is no reason not to look for what does.
        own, problem = _own_layout(given, arguments.gpus)
        candidates = possible_layouts(given, arguments.gpus, arguments.gpus_per_node)
    except UserError as error:
        print(f"plan.py: {error}", file=sys.stderr)
        return 2
    fitting = fitting_layouts(candidates, arguments.gpu_memory, MOST_LAYOUTS)
    nearest = None if fitting else smallest_layout(candidates)
    if arguments.json:
        print(json.dumps(_as_json(own, problem, fitting, nearest, arguments.gpu_memory), indent=2))
    else:
        _print(arguments, own, problem, fitting, nearest)
    return 0 if own is not None and own.memory.fits(arguments.gpu_memory) else 1


class _OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"plan.py: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(description="What a recipe takes of a GPU's memory, and the layouts that fit.")
    parser.add_argument("recipe", type=Path, metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="changes one field of the recipe")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs of the trainer, all nodes together")
    parser.add_argument("--gpu-memory", type=float, required=True, metavar="GIB", help="memory of one GPU in GiB")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument("--json", action="store_true", help="print JSON; sizes in GiB")
    return parser


def _own_layout(given: Recipe, num_gpus: int) -> tuple[Layout | None, str | None]:
    """The recipe's layout with as many replicas as the GPUs make; or None, and why not."""
    parallel = given.parallel
    if num_gpus % parallel.model_size:
        sizes = f"{parallel.tensor} × {parallel.pipeline} × {parallel.context}"
        return None, f"the recipe's tensor × pipeline × context ({sizes}) does not divide {num_gpus} GPUs"
    try:
        recipe = recipe_for_world_size(given, num_gpus)
    except UserError as error:
        return None, str(error).replace("the launcher started", "are given").splitlines()[0]
    return Layout(recipe.parallel, estimate(recipe)), None


def _print(
    arguments: argparse.Namespace,
    own: Layout | None,
    problem: str | None,
    fitting: list[Layout],
    nearest: Layout | None,
) -> None:
    console, gib = Console(highlight=False), arguments.gpu_memory
    size = f"{arguments.gpus} × {gib:g} GiB"
    if own is None:
        console.print(f"[bold red]does not run[/] on {size}: {problem}", soft_wrap=True)
    else:
        console.print(f"[bold]{arguments.recipe.name}[/] on {size}: {_words(own.parallel)}", soft_wrap=True)
        console.print(_parts_table(own.memory))
        spare = gib - own.memory.total_gib
        verdict = "[bold green]fits[/], with" if spare >= 0 else "[bold red]does not fit[/] by"
        left = " to spare" if spare >= 0 else ""
        rank = _rank_words(own.memory)
        console.print(f"{verdict} {abs(spare):.1f} GiB{left} on the fullest rank: {rank}", soft_wrap=True)
    if nearest is not None:
        console.print(f"\nNo layout fits {size}. The nearest needs {nearest.memory.total_gib:.1f} GiB a GPU:")
        console.print(f"  {nearest.overrides()}", soft_wrap=True)
        return
    console.print()
    console.print(_layouts_table(fitting))
    console.print("Best: " + fitting[0].overrides(), soft_wrap=True)


def _parts_table(memory: MemoryEstimate) -> Table:
    table = Table()
    table.add_column("on the fullest rank")
    table.add_column("GiB", justify="right")
    worst = memory.worst
    for part, size in sorted(worst.parts.items(), key=lambda item: -item[1]):
        number = f"{size / GIB:.2f}"
        if worst.is_at_peak(part):
            table.add_row(part, number)
        else:
            table.add_row(f"[dim]{part} (not at the peak)[/]", f"[dim]({number})[/]")
    table.add_section()
    table.add_row(f"[bold]peak: {worst.peak_phase}[/]", f"[bold]{memory.total_gib:.2f}[/]")
    return table


def _layouts_table(layouts: list[Layout]) -> Table:
    table = Table(title="Layouts that fit, best first", title_justify="left")
    sizes = ("tensor", "expert", "expert_tensor", "pipeline", "context", "data")
    for heading in (*sizes, "GiB"):
        table.add_column(heading, justify="right")
    for layout in layouts:
        parallel = layout.parallel.model_copy(update={"expert_tensor": layout.parallel.expert_tensor_size})
        table.add_row(*(str(getattr(parallel, size)) for size in sizes), f"{layout.memory.total_gib:.1f}")
    return table


def _words(parallel: ParallelSection) -> str:
    virtual = f" ({parallel.virtual_pipeline} virtual stages)" if parallel.virtual_pipeline else ""
    return (
        f"tensor {parallel.tensor}, expert {parallel.expert}, expert_tensor {parallel.expert_tensor_size}, "
        f"pipeline {parallel.pipeline}{virtual}, context {parallel.context}, data {parallel.data}"
    )


def _rank_words(memory: MemoryEstimate) -> str:
    worst = memory.worst
    holds = f", which holds the {worst.holds}" if worst.holds else ""
    return f"pipeline stage {worst.stage + 1} of {len(memory.stages)}{holds}"


def _as_json(
    own: Layout | None, problem: str | None, fitting: list[Layout], nearest: Layout | None, gib: float
) -> dict[str, Any]:
    def layout(it: Layout) -> dict[str, Any]:
        sizes = it.parallel.model_dump(exclude={"distributed_optimizer"})
        return {"parallel": sizes, "total_gib": it.memory.total_gib, "fits": it.memory.fits(gib)}

    def with_parts(it: Layout) -> dict[str, Any]:
        worst = it.memory.worst
        rank = {"stage": worst.stage, "holds": worst.holds, "peak_phase": worst.peak_phase}
        return layout(it) | {"parts_gib": it.memory.parts_gib, "worst_rank": rank}

    return {
        "recipe": None if own is None else with_parts(own),
        "problem": problem,
        "layouts": [layout(it) for it in fitting],
        "nearest": None if nearest is None else layout(nearest),
    }


if __name__ == "__main__":
    sys.exit(main())
