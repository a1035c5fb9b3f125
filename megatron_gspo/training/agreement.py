"""What all ranks decide together, where one of them knows something the others do not.

In: what this rank has met. Out: one answer that every rank shares, so that none goes on alone into a collective.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from megatron_gspo import parallel
from megatron_gspo.platform import device
from megatron_gspo.rollout.engine import EngineGoneError
from megatron_gspo.types import UserError

T = TypeVar("T")


class SaidByMainRankError(UserError):
    """The main rank says what is wrong; this rank ends as well, in silence."""

    said_elsewhere = True


class OutageError(EngineGoneError):
    """A rollout engine is gone, as every rank knows."""

    of_all_ranks = True


def on_any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank. A collective over all ranks."""
    verdict = torch.tensor(int(flag), device=device())
    dist.all_reduce(verdict, op=dist.ReduceOp.MAX)
    return bool(verdict)


def on_main_rank(make: Callable[[], T]) -> T:
    """What `make` returns on the main rank, on every rank; the others do not call it.

    Raises:
        UserError: `make` raised it, or an OSError, which it then quotes; on every rank.
    """
    made: T | None = None
    refusal: str | None = None
    if parallel.is_main_rank():
        try:
            made = make()
        except (UserError, OSError) as error:
            refusal = str(error)
    box = [made, refusal]
    dist.broadcast_object_list(box, src=0, device=device())
    refuse_together(cast(str | None, box[1]))
    return cast(T, box[0])


def together(do: Callable[[], T]) -> T:
    """What `do` returns on this rank; where it is refused on any rank, all are, with the first one's words.

    `do` must need no other rank. Without this, a rank that is refused alone would leave the others waiting for it.

    Raises:
        UserError: on every rank.
    """
    done: T | None = None
    refusal: str | None = None
    try:
        done = do()
    except UserError as error:
        refusal = str(error)
    refuse_together(next((words for words in parallel.gather_objects(refusal) if words is not None), None))
    return cast(T, done)


def unless_an_engine_is_gone(sample: Callable[[], T]) -> T:
    """What `sample` returns on this rank. Every rank calls this; `sample` must need no other rank.

    Raises:
        OutageError: on every rank, where the engine of any is gone; with the first one's words.
    """
    sampled: T | None = None
    gone: str | None = None
    try:
        sampled = sample()
    except EngineGoneError as error:
        gone = str(error)
    words = next((words for words in parallel.gather_objects(gone) if words is not None), None)
    if words is not None:
        raise OutageError(words)
    return cast(T, sampled)


def refuse_together(refusal: str | None) -> None:
    """Raise `UserError` on every rank where `refusal`, the same on every rank, is not None."""
    if refusal is None:
        return
    if parallel.is_main_rank():
        raise UserError(refusal)
    raise SaidByMainRankError(refusal)
