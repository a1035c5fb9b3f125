"""Scores a step's responses.

In: responses as text, with their prompts. Out: one reward each. A reward that raises, hangs, or returns no number scores 0,
is counted, and is logged: it never ends the run.

`exact` and `last_digit` run in this process, since they can do none of that. Every other reward runs in worker processes that can be ended.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import LifoQueue

import numpy as np

from megatron_gspo.reward.exact import exact, last_digit
from megatron_gspo.reward.process import RewardError, RewardProcess
from megatron_gspo.reward.registry import BY_PROBLEM, REWARDS, ScoringItem, reward_import_path
from megatron_gspo.types import UserError

logger = logging.getLogger(__name__)

_MAX_WORKERS = 4
_IN_PROCESS = {REWARDS["exact"]: exact, REWARDS["last_digit"]: last_digit}


@dataclass(frozen=True)
class ScoredBatch:
    """The rewards of a batch of responses."""

    rewards: np.ndarray  # [n] float32
    reasons: Mapping[int, str]  # position in the batch -> why its reward failed, and is 0

    @property
    def num_failed(self) -> int:
        """Responses whose reward failed."""
        return len(self.reasons)


class RewardScorer:
    """Scores responses by one reward; its worker processes are started when first needed and kept until `close`."""

    def __init__(self, name: str, timeout_s: float, num_workers: int | None = None) -> None:
        """Prepare to score.

        Args:
            name: `task`, a name in `REWARDS`, or `package.module:function`.
            timeout_s: what one response may take.
            num_workers: worker processes, each scoring a response at a time; default one a core, up to four.

        Raises:
            UserError: there is no such reward.
        """
        self._import_path = None if name == BY_PROBLEM else reward_import_path(name)
        num_workers = num_workers or min(_MAX_WORKERS, os.cpu_count() or 1)
        # Last in, first out: few responses keep to the processes that already run.
        self._idle: LifoQueue[RewardProcess] = LifoQueue()
        self._processes = [RewardProcess(timeout_s) for _ in range(num_workers)]
        for process in self._processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="reward")
        self._warned_of_range = False
        if self._import_path is not None and self._import_path not in _IN_PROCESS:
            self._load_in_one_process(self._import_path)

    def score(self, items: Sequence[ScoringItem]) -> ScoredBatch:
        """Score responses; their order is kept.

        Raises:
            UserError: a problem asks for a reward that cannot be imported.
        """
        outcomes = list(self._threads.map(self._outcome, items))
        reasons = {position: outcome for position, outcome in enumerate(outcomes) if isinstance(outcome, str)}
        rewards = np.array([0.0 if isinstance(outcome, str) else outcome for outcome in outcomes], dtype=np.float32)
        self._log_failures(items, reasons)
        self._warn_of_range(rewards)
        return ScoredBatch(rewards, reasons)

    def close(self) -> None:
        """End the worker processes."""
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.close()

    def _outcome(self, item: ScoringItem) -> float | str:
        """The reward, or why there is none."""
        import_path = self._import_path or reward_import_path(str(item.prompt.metadata["reward"]))
        if import_path in _IN_PROCESS:
            return _IN_PROCESS[import_path](item.prompt, item.response_text, item.finished)
        process = self._idle.get()
        try:
            return process.score(import_path, item)
        except RewardError as error:
            return str(error)
        finally:
            self._idle.put(process)

    def _load_in_one_process(self, import_path: str) -> None:
        process = self._idle.get()
        try:
            process.load(import_path)
        except UserError:
            self.close()
            raise
        self._idle.put(process)

    def _log_failures(self, items: Sequence[ScoringItem], reasons: Mapping[int, str]) -> None:
        if reasons:
            position, reason = next(iter(reasons.items()))
            logger.warning(
                "The reward failed for %d of %d responses, which score 0; the first, to %s: %s",
                len(reasons),
                len(items),
                items[position].prompt.id,
                reason,
            )

    def _warn_of_range(self, rewards: np.ndarray) -> None:
        outside = rewards[(rewards < 0) | (rewards > 1)]
        if len(outside) and not self._warned_of_range:
            self._warned_of_range = True
            logger.warning("A reward of %g was given; the paper's lie in [0, 1]. It is used as it is.", outside[0])
