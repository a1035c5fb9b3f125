"""The ranks of a run: who they are, how they are arranged, and the few collectives that more than one part needs.

In: what torchrun or srun put in the environment, and the recipe's parallel sizes. Out: Megatron's process groups, seeded
generators, and answers to "which share of the data is mine" and "what do all ranks say together".

The layout is Megatron's: from the fastest to the slowest changing, tensor, context, data, pipeline. Experts are laid out
over the same ranks by expert-tensor, expert, expert-data, pipeline.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist

from megatron_gspo.config import ParallelSection
from megatron_gspo.gloo import prepare_gloo
from megatron_gspo.launch import place_of_this_process
from megatron_gspo.platform import detect_machine, device, prepare_megatron
from megatron_gspo.types import UserError

prepare_megatron()
if detect_machine().backend == "gloo":
    prepare_gloo()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402

T = TypeVar("T")


def initialize_distributed(timeout_s: float = 1800.0) -> None:
    """Join the other ranks: those torchrun or srun started, or none.

    Under torchrun `RANK`, `LOCAL_RANK` and `WORLD_SIZE` say who this is; under srun `SLURM_PROCID`, `SLURM_LOCALID` and
    `SLURM_STEP_NUM_TASKS`. Started plainly, this process is a world of its own. Does nothing where this was done before.

    Raises:
        UserError: there are other ranks but `MASTER_ADDR` and `MASTER_PORT` do not say where to meet them.
    """
    if dist.is_initialized():
        return
    place = place_of_this_process()
    machine = detect_machine()
    if machine.has_cuda:
        torch.cuda.set_device(place.local_rank % machine.num_gpus)
    # A world of one meets nobody: it needs neither address nor port.
    store = dist.HashStore() if place.world_size == 1 else None
    if store is None:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise UserError(
                    f"{place.world_size} ranks were started but {name} is not set; start them with torchrun, "
                    "or export MASTER_ADDR and MASTER_PORT before srun"
                )
    dist.init_process_group(
        machine.backend,
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=timeout_s),
    )


def initialize_model_parallel(parallel: ParallelSection, seed: int) -> None:
    """Arrange the ranks as `parallel` says and seed every generator.

    A former arrangement is given up, with its process groups; one of the same sizes stays, and is seeded anew.

    `parallel.data` is not read: the number of data-parallel replicas is what the world size leaves.

    Raises:
        UserError: the sizes do not divide the number of ranks.
    """
    world_size = dist.get_world_size()
    expert_tensor = parallel.expert_tensor_size
    _check_divides(world_size, "tensor, context and pipeline", parallel.tensor * parallel.context * parallel.pipeline)
    _check_divides(
        world_size, "expert_tensor, expert and pipeline", expert_tensor * parallel.expert * parallel.pipeline
    )
    if not _is_arranged_as(parallel):
        _give_up_arrangement()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            # Megatron takes 1 for an interleaved schedule with one chunk.
            virtual_pipeline_model_parallel_size=None if parallel.virtual_pipeline == 1 else parallel.virtual_pipeline,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=expert_tensor,
        )
    # This project draws from neither of the first two; libraries and rewards of one's own may.
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def _is_arranged_as(parallel: ParallelSection) -> bool:
    """Whether the ranks are arranged in these sizes already."""
    if not parallel_state.model_parallel_is_initialized():
        return False
    arranged = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
        parallel_state.get_expert_tensor_parallel_world_size(),
    )
    return arranged == (
        parallel.tensor,
        parallel.pipeline,
        parallel.virtual_pipeline or 1,
        parallel.context,
        parallel.expert,
        parallel.expert_tensor_size,
    )


def _give_up_arrangement() -> None:
    """Forget Megatron's groups, and end them.

    Megatron's `destroy_model_parallel` forgets most of them only (megatron/core/parallel_state.py, 0.16.1): torch keeps
    those, each with threads of gloo that wake up a hundred times a second for as long as the process lives.
    """
    # None stands for the group of all ranks.
    groups = [group for group in parallel_state._global_process_group_list or [] if group is not None]
    if groups:
        dist.barrier()  # no rank still waits for another one in a group that this one ends
    for group in groups:
        dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def shutdown() -> None:
    """Leave the other ranks and free all process groups; `initialize_distributed` may follow."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def notice(name: str) -> None:
    """Let the other ranks know something. No collective: they find it when they look (`is_noticed`)."""
    if _has_peers():
        _store().set(name, "")


def is_noticed(name: str) -> bool:
    """Whether any rank has let the others know this. Returns at once, from any thread."""
    return _has_peers() and bool(_store().check([name]))


def _has_peers() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _store() -> dist.Store:
    """Where ranks met, which serves them to the end (torch 2.13, distributed/distributed_c10d.py)."""
    return dist.distributed_c10d._get_default_store()


def data_rank() -> int:
    """Which share of the data this rank works on; equal on all ranks that hold one copy of the model together."""
    return parallel_state.get_data_parallel_rank()


def data_size() -> int:
    """How many shares the data is cut into."""
    return parallel_state.get_data_parallel_world_size()


def is_data_leader() -> bool:
    """Whether this rank drives its share of the data: the first of the ranks that hold one copy of the model."""
    return is_first_token_rank() and parallel_state.get_pipeline_model_parallel_rank() == 0


def is_last_stage() -> bool:
    """Whether this rank is on the last pipeline stage, where log-probs and losses are."""
    return parallel_state.is_pipeline_last_stage(ignore_virtual=True)


def reports_metrics() -> bool:
    """Whether this rank's measurements count: one rank a share of the data, where log-probs and losses are."""
    return is_last_stage() and is_first_token_rank()


def is_main_rank() -> bool:
    """Whether this rank speaks for the run: it logs and writes what exists once."""
    return dist.get_rank() == 0


def broadcast_from_data_leader(value: T | None) -> T:
    """The data leader's `value` on every rank that holds the same copy of the model; the others may pass None."""
    box = [value]
    # Context-parallel ranks hold the same copy too, but Megatron's model-parallel group leaves them out: two hops.
    context = parallel_state.get_context_parallel_group()
    if context.size() > 1 and _is_first_of_model_parallel_group():
        dist.broadcast_object_list(box, group=context, group_src=0)
    group = parallel_state.get_model_parallel_group()
    if group.size() > 1:
        dist.broadcast_object_list(box, group=group, group_src=0)
    return cast(T, box[0])


def gather_objects(value: T) -> list[T]:
    """Every rank's `value`, in rank order, on every rank."""
    if dist.get_world_size() == 1:
        return [value]
    gathered: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return cast(list[T], gathered)


def gather_over_data_ranks(value: T) -> list[T]:
    """The `value` of every share of the data, in order; of the ranks at this one's place in their copies of the model."""
    group = parallel_state.get_data_parallel_group()
    gathered: list[T | None] = [None] * group.size()
    dist.all_gather_object(gathered, value, group=group)
    return cast(list[T], gathered)


def exchange_over_data_ranks(outgoing: Sequence[T]) -> list[T]:
    """Send `outgoing[r]` to share r of the data; returns what every share sent here, in order.

    Among the ranks at the same place in their copies of the model. Nothing travels further than to where it is sent.
    """
    group = parallel_state.get_data_parallel_group()
    assert len(outgoing) == group.size(), "one parcel a share of the data"
    incoming = []
    for sender in range(group.size()):
        box: list[T | None] = [None]
        dist.scatter_object_list(box, list(outgoing) if sender == group.rank() else None, group=group, group_src=sender)
        incoming.append(box[0])
    return cast(list[T], incoming)


def sum_over_data_ranks(values: Sequence[float]) -> list[float]:
    """Each of `values`, summed over the shares of the data (one rank a share counts), in float64, on every rank."""
    return _reduce_over_data_ranks(values, dist.ReduceOp.SUM)


def max_over_data_ranks(value: int) -> int:
    """The largest `value` of all shares of the data, on every rank."""
    return round(_reduce_over_data_ranks([float(value)], dist.ReduceOp.MAX)[0])


def sum_over_all_ranks(values: torch.Tensor) -> torch.Tensor:
    """`values`, equally shaped everywhere, summed over every rank of the run; `values` itself is left alone."""
    return _sum(values, None)


def sum_over_token_ranks(values: torch.Tensor) -> torch.Tensor:
    """`values` summed over the tensor- and context-parallel ranks that share a micro-batch's tokens in the same layers."""
    return _sum(values, parallel_state.get_tensor_and_context_parallel_group())


def sum_over_stages(values: torch.Tensor) -> torch.Tensor:
    """`values` summed over the pipeline stages of one copy of the model."""
    return _sum(values, parallel_state.get_pipeline_model_parallel_group())


def is_first_token_rank() -> bool:
    """Whether this rank is the one to count what all ranks that share a micro-batch's tokens know alike."""
    return parallel_state.get_tensor_model_parallel_rank() == 0 and is_first_context_rank()


def is_first_context_rank() -> bool:
    """Whether this rank is the one to count what all context-parallel ranks of its group know alike."""
    return parallel_state.get_context_parallel_rank() == 0


def _sum(values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    total = values.to(device=device(), copy=True)
    if dist.get_world_size(group) > 1:
        dist.all_reduce(total, group=group)
    return total


def _reduce_over_data_ranks(values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
    totals = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(totals, op=operation, group=parallel_state.get_data_parallel_group())
    return totals.tolist()


def _is_first_of_model_parallel_group() -> bool:
    return parallel_state.get_model_parallel_group().rank() == 0


def _check_divides(world_size: int, fields: str, product: int) -> None:
    if world_size % product:
        raise UserError(
            f"parallel.{{{fields}}} multiply to {product}, which does not divide the number of ranks, {world_size}"
        )
