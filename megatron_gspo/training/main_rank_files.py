"""What Megatron writes of a checkpoint on the main rank alone: common.pt, .metadata and metadata.json.

In: calls of Megatron's that write one of them. Out: the same calls, and what the main rank met while it wrote, raised on
every rank. Megatron raises that at once, while the other ranks wait for the main one in the next collective.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_gspo.training.agreement import on_main_rank

#: Whether torch's writer of archives speaks, in a RuntimeError, which does not say what the operating system said.
TORCH_COULD_NOT_WRITE = re.compile("PytorchStreamWriter failed|inline_container|iostream error")

#: Of Megatron-Core 0.16.1: the function that writes each of them.
_WRITERS: tuple[tuple[Any, str], ...] = (
    (TorchCommonSaveStrategy, "save_common"),
    (FileSystemWriterAsync, "finish"),
    (serialization, "save_config"),
)


@contextmanager
def heard_by_all_ranks() -> Iterator[None]:
    """Within it these files may fail to be written; at its end, where all ranks meet, all of them raise.

    Raises:
        UserError: on all ranks, in the words of what the main rank met first.
    """
    problems: list[Exception] = []
    originals = [getattr(owner, name) for owner, name in _WRITERS]
    for (owner, name), original in zip(_WRITERS, originals, strict=True):
        setattr(owner, name, _keeping(problems, original))
    try:
        yield
    finally:
        for (owner, name), original in zip(_WRITERS, originals, strict=True):
            setattr(owner, name, original)
    on_main_rank(lambda: _raise_first(problems))


def _keeping(problems: list[Exception], write: Callable[..., None]) -> Callable[..., None]:
    """`write`, which adds to `problems` what the operating system, or torch for it, refuses."""

    @functools.wraps(write)
    def write_or_keep(*args: Any, **options: Any) -> None:
        try:
            write(*args, **options)
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not TORCH_COULD_NOT_WRITE.search(str(error)):
                raise
            problems.append(error)

    return write_or_keep


def _raise_first(problems: list[Exception]) -> None:
    for problem in problems:
        raise OSError(str(problem)) from problem
