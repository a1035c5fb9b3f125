"""What the ranks of test_rank_pool.py run."""

import time

import torch
import torch.distributed as dist


def own_rank_and_sum(value: int) -> list[int]:
    total = torch.tensor(value)
    dist.all_reduce(total)
    return [dist.get_rank(), int(total)]


def raise_on_rank(guilty: int) -> None:
    if dist.get_rank() == guilty:
        raise ValueError(f"rank {guilty} raises this")
    dist.barrier()


def sleep_on_rank(guilty: int) -> None:
    if dist.get_rank() == guilty:
        time.sleep(600)
