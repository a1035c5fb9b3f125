"""Being asked to stop: SIGTERM and SIGUSR1, as schedulers send them before they take a machine away.

In: signals. Out: `requested`, which the loop asks for after every step; a second signal ends the process at once. What a
step waits for may never come: whoever waits asks `is_stop_requested`, which also knows of signals to other ranks.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

from megatron_gspo import parallel
from megatron_gspo.launch import STOP_SIGNALS, deliver_stop_signals

#: A signal this soon after the first is the same request, sent to a launcher and its ranks alike and passed on by it.
SAME_REQUEST_S = 5.0
NOTICE = "stop requested"

_requested = threading.Event()  # of the process, as its signals are


def is_stop_requested() -> bool:
    """Whether this rank was asked to stop, or another one was and could say so. Needs no rank's help, from any thread."""
    return _requested.is_set() or parallel.is_noticed(NOTICE)


class StopRequest:
    """Listens from when it is made, and to what came while signals were held (`launch.hold_stop_signals`).

    They are heard by a thread, so also while the process waits for other ranks.
    """

    def __init__(self) -> None:
        _requested.clear()
        self._heard_at: float | None = None
        self._listening, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: None)
        # Python writes the number of every signal here, from within the signal's handler in C.
        signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="stop request", daemon=True).start()
        deliver_stop_signals()

    @property
    def requested(self) -> bool:
        """Whether this rank was asked."""
        return _requested.is_set()

    def _listen(self) -> None:
        while True:
            for number in self._listening.recv(64):
                if number in STOP_SIGNALS:
                    self._hear(number)

    def _hear(self, number: int) -> None:
        now = time.monotonic()
        if self._heard_at is None:
            self._heard_at = now
            _requested.set()
            parallel.notice(NOTICE)
        elif now - self._heard_at > SAME_REQUEST_S:
            os._exit(128 + number)
