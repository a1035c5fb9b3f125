"""Real ranks for tests: worker processes that stay up between tests, because starting one takes seconds.

`RankPool.run("tests.distributed.module:function", num_ranks=2, argument=...)` calls the function on every rank, each a
process of its own that has joined the others through `parallel.initialize_distributed`; the function arranges them with
`parallel.initialize_model_parallel` itself. Arguments are JSON; what a rank returns is a tensor or anything of
dictionaries, lists and numbers around tensors. A rank that raises ends, and its traceback is in the error; ranks that do
not answer in time are ended after printing where they stand. Either way the next call starts fresh ones.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).parents[2]


class RankError(AssertionError):
    """A rank raised, died, or did not answer."""


class RankPool:
    """Worker processes, started when first needed."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="rank_pool_"))
        self._workers: list[_Worker] = []
        self._num_runs = 0

    def run(self, function: str, *, num_ranks: int, timeout_s: float = 120.0, **arguments: Any) -> list[Any]:
        """Call `function` ("package.module:name") on `num_ranks` ranks; returns what each returned, in rank order.

        Raises:
            RankError: with what every failed or silent rank printed.
        """
        self._num_runs += 1
        while len(self._workers) < num_ranks:
            self._workers.append(_Worker(len(self._workers), self._directory))
        ranks = self._workers[:num_ranks]
        port = _free_port()
        results = [self._directory / f"run{self._num_runs}_rank{worker.rank}.pt" for worker in ranks]
        for worker, result in zip(ranks, results, strict=True):
            worker.send(
                {
                    "function": function,
                    "arguments": arguments,
                    "environment": {
                        "RANK": str(worker.rank),
                        "LOCAL_RANK": str(worker.rank),
                        "WORLD_SIZE": str(num_ranks),
                        "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(port),
                    },
                    "result": str(result),
                }
            )
        self._wait(ranks, results, timeout_s)
        returned = [torch.load(result, weights_only=True) for result in results]
        for result in results:
            result.unlink()
        return returned

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _wait(self, ranks: list[_Worker], results: list[Path], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not all(result.exists() for result in results):
            dead = [worker for worker in ranks if not worker.is_alive()]
            if dead:
                raise RankError(self._give_up(dead, "failed"))
            if time.monotonic() > deadline:
                silent = [worker for worker, result in zip(ranks, results, strict=True) if not result.exists()]
                raise RankError(self._give_up(silent, f"did not answer within {timeout_s:.0f} s"))
            time.sleep(0.005)

    def _give_up(self, guilty: list[_Worker], reason: str) -> str:
        """End every worker; the words of the guilty ones."""
        for worker in guilty:
            worker.abort()
        message = "\n".join(f"rank {worker.rank} {reason}:\n{worker.output()}" for worker in guilty)
        for worker in self._workers:
            worker.kill()
        self._workers.clear()
        return message


class _Worker:
    """One process, and what it has printed since the last call."""

    def __init__(self, rank: int, directory: Path) -> None:
        self.rank = rank
        self._log = directory / f"rank{rank}.log"
        self._start_of_output = 0
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.distributed.rank_pool"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
                cwd=REPOSITORY,
            )

    def send(self, task: dict[str, Any]) -> None:
        self._start_of_output = self._log.stat().st_size
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def abort(self) -> None:
        """End it so that it prints where it stands."""
        if self.is_alive():
            self._process.send_signal(signal.SIGABRT)
            self._process.wait()

    def kill(self) -> None:
        if self.is_alive():
            self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()

    def output(self) -> str:
        with self._log.open() as log:
            log.seek(self._start_of_output)
            return log.read()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def work() -> None:
    """A worker's life: a task a line on standard input, until it is closed."""
    from megatron_gspo import parallel

    faulthandler.enable()
    torch.set_num_threads(1)
    for line in sys.stdin:
        task = json.loads(line)
        os.environ.update(task["environment"])
        module, _, name = task["function"].partition(":")
        parallel.initialize_distributed(timeout_s=600.0)
        sys.excepthook = sys.__excepthook__  # torch.distributed adds a prefix at every start
        returned = getattr(importlib.import_module(module), name)(**task["arguments"])
        parallel.shutdown()
        result = Path(task["result"])
        aside = result.with_suffix(".incomplete")
        torch.save(returned, aside)
        aside.rename(result)


if __name__ == "__main__":
    work()
