"""Which runs a submission asks for, and what each needs of the cluster.

In: the recipes, arms, seeds and overrides. Out: the runs, each with its resolved recipe and its directory, and the ranks
a node. What cannot run is refused here, before the scheduler is asked.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from megatron_gspo.config import Recipe, load_recipe, recipe_for_world_size, require_data_files
from megatron_gspo.slurm.arguments import Submission
from megatron_gspo.slurm.roles import check_servers, remark_on_memory, starts_servers
from megatron_gspo.types import UserError


@dataclass(frozen=True)
class PlannedRun:
    """One run of the job, or of its array."""

    recipe: Recipe  # for the ranks of the allocation
    directory: Path


@dataclass(frozen=True)
class Plan:
    """All runs of a submission; they share one `slurm` section and have as many ranks each."""

    runs: tuple[PlannedRun, ...]
    ranks_per_node: int
    remarks: tuple[str, ...]  # worth knowing, and no reason to refuse

    @property
    def recipe(self) -> Recipe:
        """The first run's, whose `slurm` section all share."""
        return self.runs[0].recipe


def make_plan(submission: Submission) -> Plan:
    """Load and check everything that was asked for.

    Raises:
        UserError: a recipe is wrong, its layout does not fit the nodes, its data is not there, or a directory is in use.
    """
    arms = (submission.recipe, *submission.arms)
    names = [arm.stem for arm in arms]
    if len(set(names)) < len(names):
        raise UserError(f"--arms: two arms have one name ({', '.join(names)}); accepted: files with different names")
    seeds = submission.seeds or (None,)
    runs, remarks, sizes = [], [], set()
    for arm in arms:
        for seed in seeds:
            overrides = submission.overrides + (() if seed is None else (f"seed={seed}",))
            recipe, ranks_per_node, said = _on_its_nodes(load_recipe(arm, overrides))
            directory = submission.output_dir
            if submission.is_comparison:
                directory /= f"{arm.stem}_seed_{recipe.seed}"
            runs.append(PlannedRun(recipe, directory))
            remarks += said
            sizes.add(ranks_per_node)
    _check_alike(runs, sizes)
    for run in runs:
        refuse_directory_in_use(run.directory)
        if starts_servers(run.recipe):
            _refuse_unwritable(
                run.directory.parent, "accepted: one that can, as the servers' directory lies beside the run's"
            )
    return Plan(tuple(runs), sizes.pop(), tuple(dict.fromkeys(remarks)))


def _on_its_nodes(recipe: Recipe) -> tuple[Recipe, int, list[str]]:
    """The recipe with as many replicas as its nodes hold ranks, the ranks a node, and remarks."""
    require_data_files(recipe)
    remarks = check_servers(recipe)
    slurm, parallel = recipe.slurm, recipe.parallel
    nodes = slurm.nodes - slurm.rollout_nodes
    named = "slurm.nodes - rollout_nodes" if slurm.rollout_nodes else "slurm.nodes"
    if slurm.gpus_per_node == 0:
        if parallel.world_size % nodes:
            raise UserError(
                f"{named} is {nodes}; accepted: a divisor of the layout's {parallel.world_size} ranks "
                f"(parallel.tensor × pipeline × context × data), or slurm.gpus_per_node"
            )
        return recipe, parallel.world_size // nodes, remarks
    ranks = nodes * slurm.gpus_per_node
    if ranks % parallel.model_size:
        raise UserError(
            f"{named} × slurm.gpus_per_node is {nodes} × {slurm.gpus_per_node} = {ranks} ranks; accepted: a "
            f"multiple of parallel.tensor × pipeline × context ({parallel.tensor} × {parallel.pipeline} × "
            f"{parallel.context} = {parallel.model_size})"
        )
    if ranks != parallel.world_size:
        remarks.append(f"{ranks} GPUs hold {ranks // parallel.model_size} replicas: parallel.data is set to that")
    if nodes > 1 and parallel.tensor > slurm.gpus_per_node:
        remarks.append(
            f"parallel.tensor {parallel.tensor} reaches over nodes of {slurm.gpus_per_node} GPUs: every layer waits for "
            "the network between them"
        )
    resized = recipe_for_world_size(recipe, ranks)
    return resized, slurm.gpus_per_node, remarks + remark_on_memory(resized)


def _check_alike(runs: list[PlannedRun], sizes: set[int]) -> None:
    if len(sizes) > 1:
        raise UserError(f"--arms: the layouts take {sorted(sizes)} ranks a node; accepted: as many for every arm")
    if any(run.recipe.slurm != runs[0].recipe.slurm for run in runs):
        raise UserError("--arms: the recipes' slurm sections differ; accepted: one for all, as they are one array")


def refuse_directory_in_use(directory: Path) -> None:
    """Raise `UserError` where a run was submitted to `directory` before, or has run there, or it cannot be written.

    Makes nothing. The nearest directory above it that exists is asked.
    """
    script = directory / "slurm" / "train.sbatch"
    if (directory / "slurm").exists() or (directory / "metrics.jsonl").exists():
        how = f"; to go on with it: sbatch {script}" if script.exists() else ""
        raise UserError(f"--output-dir: {directory} holds a run already{how}; accepted: a new directory")
    if set(str(directory)) & set("\"'\\%\n"):
        raise UserError(
            f"--output-dir: {directory} has quotes, a backslash, % or a line break; accepted: a name without"
        )
    _refuse_unwritable(directory, "accepted: a directory all nodes share")


def _refuse_unwritable(directory: Path, why: str) -> None:
    above = directory
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK) or _is_read_only(above):
        raise UserError(f"--output-dir: {directory} cannot be written ({above}); {why}")


def _is_read_only(directory: Path) -> bool:
    return bool(os.statvfs(directory).f_flag & os.ST_RDONLY)
