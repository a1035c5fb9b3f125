"""The near end of the pipe to a reward worker: starts it, asks it, and ends it where it hangs."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import IO

from megatron_gspo.reward.registry import ScoringItem
from megatron_gspo.types import UserError

LOAD_TIMEOUT_S = 120.0
"""Starting Python and importing a reward's libraries from a busy network file system takes its time."""
_EXIT_GRACE_S = 1.0


class RewardError(Exception):
    """A response could not be scored; the message says why."""


class RewardProcess:
    """A worker process, started when it is first needed and again after it hung or died. Not for two threads at a time."""

    def __init__(self, timeout_s: float) -> None:
        """`timeout_s`: what scoring one response may take; loading a reward has a limit of its own."""
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._loaded: set[str] = set()  # by the process that runs now
        self._known: set[str] = set()  # by any process so far: these can be imported

    def load(self, import_path: str) -> None:
        """Have the worker import a reward, starting it if need be.

        Raises:
            UserError: it cannot be imported, or is not a function.
            RewardError: it could be before, and now cannot.
        """
        if self._process is not None and import_path in self._loaded:
            return
        try:
            reply = self._ask({"load": import_path}, LOAD_TIMEOUT_S)
        except RewardError as error:
            reply = {"error": f"importing {import_path!r} {error}"}
        if "error" in reply:
            if import_path in self._known:  # it has worked before: a bad moment, not a bad recipe
                raise RewardError(str(reply["error"]))
            raise UserError(f"reward.name: {reply['error']}")
        self._loaded.add(import_path)
        self._known.add(import_path)

    def score(self, import_path: str, item: ScoringItem) -> float:
        """A response's reward.

        Raises:
            RewardError: the reward raised, returned no finite number, took too long, or ended its process.
            UserError: the reward cannot be imported.
        """
        self.load(import_path)
        request = {
            "score": import_path,
            "prompt": vars(item.prompt),
            "response_text": item.response_text,
            "finished": item.finished,
        }
        reply = self._ask(request, self._timeout_s)
        if "error" in reply:
            raise RewardError(str(reply["error"]))
        return float(str(reply["reward"]))

    def close(self) -> None:
        """End the worker, if one runs."""
        if self._process is not None:
            with suppress(BrokenPipeError):
                self._pipes()[0].close()  # the worker ends when its requests do
            self._end(_EXIT_GRACE_S)

    def _ask(self, request: Mapping[str, object], timeout_s: float) -> dict[str, object]:
        if self._process is None:
            self._start()
        requests, replies = self._pipes()
        try:
            # Rows of Parquet files hold what JSON does not know, such as dates: as text, a reward can still use them.
            requests.write(json.dumps(request, default=str).encode() + b"\n")
            requests.flush()
        except BrokenPipeError:
            raise RewardError(self._ended()) from None
        deadline = time.monotonic() + timeout_s
        ready = select.poll()
        ready.register(replies, select.POLLIN)
        reply = b""
        while not reply.endswith(b"\n"):
            if not ready.poll(max(0.0, deadline - time.monotonic()) * 1000):
                self._end(grace_s=0.0)
                raise RewardError(f"took longer than {timeout_s:g} s")
            received = os.read(replies.fileno(), 1 << 16)
            if not received:
                raise RewardError(self._ended())
            reply += received
        return dict(json.loads(reply))

    def _start(self) -> None:
        # A session of its own: Ctrl-C is the trainer's, and what the reward itself starts can be ended with it. Being asked
        # to stop is the trainer's as well, but SLURM signals every process of a job: the worker has these blocked.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_gspo.reward.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._loaded.clear()

    def _ended(self) -> str:
        return f"ended its process with exit status {self._end(_EXIT_GRACE_S)}"

    def _end(self, grace_s: float) -> int:
        """Wait `grace_s` for the worker to end by itself, end it and what it started, and return its exit status."""
        process, self._process = self._process, None
        assert process is not None, "only a running worker is ended"
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None, "started with pipes"
            with suppress(BrokenPipeError):
                pipe.close()
        return status

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        assert self._process is not None, "started"
        assert self._process.stdin is not None, "started with pipes"
        assert self._process.stdout is not None, "started with pipes"
        return self._process.stdin, self._process.stdout
