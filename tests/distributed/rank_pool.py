"""Real ranks for tests, cheap to start: one process imports everything once and forks the ranks of each run.

`RankPool.run("tests.distributed.module:function", num_ranks=2, argument=...)` calls the function on every rank, each a
process of its own that has joined the others through `parallel.initialize_distributed`; the function arranges them with
`parallel.initialize_model_parallel` itself. Arguments are JSON; what a rank returns is a tensor, or dictionaries, lists
and numbers with tensors in them. When a rank raises, its traceback is in the error; ranks that do not end in time are
ended after printing where they stand.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from megatron_gspo.launch import free_port

REPOSITORY = Path(__file__).parents[2]

#: After one rank has failed, the others get this long to end by themselves.
GRACE_S = 1.0


class RankError(AssertionError):
    """A rank raised, died, or did not end in time."""


class RankPool:
    """Runs functions on ranks; the process that forks them starts with the first run."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="rank_pool_"))
        self._forker: subprocess.Popen[str] | None = None

    def run(self, function: str, *, num_ranks: int, timeout_s: float = 600.0, **arguments: Any) -> list[Any]:
        """Call `function` ("package.module:name") on `num_ranks` ranks; returns what each returned, in rank order.

        Raises:
            RankError: with what every failed or late rank printed.
        """
        if self._forker is None:
            self._forker = self._start()
        assert self._forker.stdin is not None and self._forker.stdout is not None
        task = {
            "function": function,
            "arguments": arguments,
            "num_ranks": num_ranks,
            "timeout_s": timeout_s,
            "port": free_port(),
        }
        self._forker.stdin.write(json.dumps(task) + "\n")
        self._forker.stdin.flush()
        answer = self._forker.stdout.readline()
        if not answer:
            raise RankError(f"the process that forks ranks died with status {self._forker.wait()}")
        if problems := json.loads(answer):
            words = [
                f"rank {rank} {reason}:\n{(self._directory / f'rank{rank}.log').read_text()}"
                for rank, reason in problems.items()
            ]
            raise RankError("\n".join(words))
        return [torch.load(self._directory / f"rank{rank}.pt", weights_only=True) for rank in range(num_ranks)]

    def close(self) -> None:
        """End the forking process."""
        if self._forker is not None:
            self._forker.communicate()  # closes its input, which ends it
        shutil.rmtree(self._directory, ignore_errors=True)

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.rank_pool", str(self._directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
            cwd=REPOSITORY,
        )


def fork_ranks(directory: Path) -> None:
    """The forking process: a task a line in, a line out: which ranks failed and how, as JSON."""
    faulthandler.enable()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    context = multiprocessing.get_context("fork")
    for line in sys.stdin:
        task = json.loads(line)
        _import_once(task["function"].partition(":")[0])
        ranks = [context.Process(target=_be_rank, args=(rank, task, directory)) for rank in range(task["num_ranks"])]
        for process in ranks:
            process.start()
        answers.write(json.dumps(_problems(ranks, task["timeout_s"])) + "\n")


def _import_once(module: str) -> None:
    """Import what a task runs before its ranks are forked, so that none of them does."""
    gc.disable()
    importlib.import_module("megatron_gspo.model.build")
    importlib.import_module(module)
    gc.freeze()  # or the first collection of every rank would copy all that was imported
    gc.enable()


def _be_rank(rank: int, task: dict[str, Any], directory: Path) -> None:
    """One rank's life."""
    from megatron_gspo import parallel

    with (directory / f"rank{rank}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(task["num_ranks"]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(task["port"]),
    }
    parallel.initialize_distributed(timeout_s=600.0)
    module, _, name = task["function"].partition(":")
    returned = getattr(importlib.import_module(module), name)(**task["arguments"])
    torch.save(returned, directory / f"rank{rank}.pt")
    parallel.shutdown()


def _problems(ranks: list[BaseProcess], timeout_s: float) -> dict[int, str]:
    """Wait for the ranks; what went wrong with those to blame. None of them runs any more afterwards."""
    deadline = time.monotonic() + timeout_s
    while alive := [process.sentinel for process in ranks if process.is_alive()]:
        if any(process.exitcode for process in ranks):
            # The others wait for the failed one; they are not to blame.
            deadline = min(deadline, time.monotonic() + GRACE_S)
        if not multiprocessing.connection.wait(alive, timeout=max(0.0, deadline - time.monotonic())):
            break
    problems = {rank: "failed" for rank, process in enumerate(ranks) if process.exitcode}
    late = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for rank in late:
        os.kill(ranks[rank].pid or 0, signal.SIGABRT)  # faulthandler prints where it stands
    for process in ranks:
        process.join()
    return problems or dict.fromkeys(late, f"did not end within {timeout_s:.0f} s")


if __name__ == "__main__":
    fork_ranks(Path(sys.argv[1]))
