"""Sampling beside training: a rollout engine that works in a thread while the trainer makes its updates.

In: groups to be sampled. Out: the same groups, sampled, when they are asked for. One call of the engine is under way at a
time: whoever needs the engine for anything else (new weights, an evaluation) pauses it first. A pause has it give back its
groups as far as they are, and going on asks for the rest of them, with the weights that it has then.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from megatron_gspo.rollout.engine import EngineGoneError, RolloutEngine
from megatron_gspo.types import OpenGroup, SamplingSettings


class SamplingAhead:
    """One call of `RolloutEngine.generate_until` at a time, in a thread. What it raises, `pause` and `take` raise.

    EngineGoneError is raised by `take` alone: it ends a run between two steps, not in the middle of one.
    """

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout")
        self._interrupt = threading.Event()
        self._under_way: Future[list[OpenGroup]] | None = None
        self._paused: list[OpenGroup] | None = None

    def start(self, groups: Sequence[OpenGroup], num_complete: int, settings: SamplingSettings) -> None:
        """Begin to sample until `num_complete` of `groups` are complete."""
        assert self._under_way is None and self._paused is None, "what was begun before has been taken"
        self._num_complete, self._settings = num_complete, settings
        self._begin(list(groups))

    def pause(self) -> None:
        """Stop the engine until `go_on`; on return it does nothing."""
        if self._under_way is None:
            return
        self._interrupt.set()
        under_way = self._under_way
        gone = isinstance(under_way.exception(), EngineGoneError)
        self._interrupt.clear()
        if not gone:  # else `take` says so, where a step begins
            self._under_way, self._paused = None, under_way.result()

    def go_on(self) -> None:
        """Sample the rest of what `pause` stopped."""
        if self._paused is not None:
            paused, self._paused = self._paused, None
            self._begin(paused)

    def take(self) -> list[OpenGroup]:
        """The groups that `start` was given, in their order, once enough of them are complete."""
        assert self._under_way is not None, "it was started, and is not paused"
        under_way, self._under_way = self._under_way, None
        return under_way.result()

    def close(self) -> None:
        """Give up what is under way, and end the thread."""
        self._interrupt.set()
        self._thread.shutdown(cancel_futures=True)

    def _begin(self, groups: list[OpenGroup]) -> None:
        self._under_way = self._thread.submit(
            self._engine.generate_until, groups, self._num_complete, self._settings, self._interrupt
        )
