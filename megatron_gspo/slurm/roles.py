"""The roles of a job's nodes: trainers, SGLang servers, or both.

In: a recipe. Out: whether the job starts servers, where, and what is wrong with that or worth knowing; and whether the
ranks fit into the GPUs' memory, as far as that can be known on paper.
"""

from __future__ import annotations

from pathlib import Path

from megatron_gspo.config import Recipe
from megatron_gspo.memory import estimate
from megatron_gspo.types import UserError


def starts_servers(recipe: Recipe) -> bool:
    """Whether the job has SGLang servers of its own, rather than none or ones that run already."""
    return recipe.rollout.engine == "sglang" and recipe.rollout.sglang.urls is None


def servers_directory(run: Path) -> Path:
    """Where a run's job keeps its servers' key and URLs, and weights on their way; `train.sbatch` says the same in bash."""
    return run.with_name(f".{run.name}.servers")


def check_servers(recipe: Recipe) -> list[str]:
    """Remarks on the job's servers; none where it starts none.

    Raises:
        UserError: nodes are set aside for servers that the job does not start, or a node's servers take more than its GPUs.
    """
    slurm, sglang = recipe.slurm, recipe.rollout.sglang
    if not starts_servers(recipe):
        if slurm.rollout_nodes:
            why = (
                f"rollout.engine is {recipe.rollout.engine}" if sglang.urls is None else "rollout.sglang.urls is given"
            )
            raise UserError(f"slurm.rollout_nodes is {slurm.rollout_nodes}, but {why}; accepted: 0")
        return []
    if slurm.gpus_per_node == 0:
        return []
    gpus = sglang.num_servers * sglang.tensor_parallel
    if sglang.first_gpu + gpus > slurm.gpus_per_node:
        raise UserError(
            f"rollout.sglang.num_servers × tensor_parallel from first_gpu on is {sglang.num_servers} × "
            f"{sglang.tensor_parallel} from {sglang.first_gpu}; accepted: what a node of {slurm.gpus_per_node} GPUs holds "
            "(slurm.gpus_per_node), as each node starts num_servers"
        )
    idle = slurm.gpus_per_node - gpus
    if idle and slurm.rollout_nodes:
        return [f"rollout.sglang.num_servers × tensor_parallel leaves {idle} GPUs of each rollout node idle"]
    return []


def remark_on_memory(recipe: Recipe) -> list[str]:
    """A warning where the ranks will not fit into their GPUs; nothing where `slurm.gpu_memory_gib` is not given."""
    slurm = recipe.slurm
    if slurm.gpu_memory_gib is None or slurm.gpus_per_node == 0:
        return []
    left, shared = slurm.gpu_memory_gib, ""
    if starts_servers(recipe) and slurm.rollout_nodes == 0:
        left *= 1 - recipe.rollout.sglang.memory_fraction
        shared = f", of which rollout.sglang.memory_fraction leaves {left:.1f} to the rank beside a server"
    memory = estimate(recipe)
    if memory.fits(left):
        return []
    gpus = (slurm.nodes - slurm.rollout_nodes) * slurm.gpus_per_node
    return [
        f"WARNING: this will not fit: the fullest rank takes {memory.total_gib:.1f} GiB by estimate, and a GPU has "
        f"{slurm.gpu_memory_gib:g}{shared}. Layouts that fit: "
        f"python tools/plan.py RECIPE --gpus {gpus} --gpus-per-node {slurm.gpus_per_node} --gpu-memory {left:g}"
    ]
