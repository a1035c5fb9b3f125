"""Reading a rank's part of a checkpoint, several of its files at the same time.

In: a load of Megatron's (`dist_checkpointing.load`). Out: the same tensors; torch's reader takes a file after the other,
and what it reads has mostly been verified just before, so that it copies rather than waits.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from torch.distributed.checkpoint import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.planner import ReadItem
from torch.futures import Future

from megatron_gspo.training.checkpoint_store import READERS


@contextmanager
def files_read_at_once() -> Iterator[None]:
    """Within it Megatron reads `READERS` of a rank's files at the same time."""
    # Megatron-Core 0.16.1 makes its reader there, and takes none from outside.
    module: Any = torch_strategy
    make_reader = module._get_filesystem_reader

    def make_parallel_reader(*args: Any, **options: Any) -> Any:
        reader = make_reader(*args, **options)
        reader.read_data = functools.partial(_read_data, reader, reader.read_data)
        return reader

    module._get_filesystem_reader = make_parallel_reader
    try:
        yield
    finally:
        module._get_filesystem_reader = make_reader


def _read_data(
    reader: Any, read: Callable[[LoadPlan, LoadPlanner], object], plan: LoadPlan, planner: LoadPlanner
) -> Future[None]:
    """What torch calls once a load: all of the plan's items, by file, each file's by torch's own `read`."""
    by_file: dict[str, list[ReadItem]] = defaultdict(list)
    for item in plan.items:
        by_file[reader.storage_data[item.storage_index].relative_path].append(item)
    with ThreadPoolExecutor(READERS) as readers:
        for _ in readers.map(lambda items: read(replace(plan, items=items), planner), by_file.values()):
            pass  # raises what a file's reading raised
    done: Future[None] = Future()
    done.set_result(None)
    return done
