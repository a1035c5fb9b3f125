"""Settings for every test, and what tests of several directories share."""

import gc
import signal
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

from tests.end_to_end.program import Program

gc.disable()  # while tests are imported

# How long an example takes depends on what else the machine does; pytest's own time limit stops a test that hangs.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

#: Directories whose tests share what is dear to start: a cluster, a server, a process that forks ranks or runs.
TOGETHER = ("slurm", "rollout", "distributed", "end_to_end")


class SharedPartsTogether(LoadFileScheduling):
    """Gives a worker of pytest-xdist all tests of such a directory, and of the others a file."""

    def _split_scope(self, nodeid: str) -> str:
        file = PurePosixPath(nodeid.partition("::")[0])  # from the repository's root: tests/unit/...
        return file.parts[1] if file.parts[1] in TOGETHER else str(file)


def pytest_collection_finish() -> None:
    # What was imported stays: collections, which Megatron asks for at each save, would go through all of it.
    gc.freeze()
    gc.enable()


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> SharedPartsTogether:
    # xdist's own groups (`--dist loadgroup`) are not seen under pytest 9.2.
    return SharedPartsTogether(config, log)


@pytest.fixture(scope="session")
def program() -> Iterator[Program]:
    """One process that forks the runs of all tests of this session."""
    forked = Program()
    yield forked
    forked.close()


@pytest.fixture
def _signals_as_they_were() -> Iterator[None]:
    """For tests that train in this process: a run listens to signals to its end, which is the process's."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    wakeup = signal.set_wakeup_fd(-1)
    yield
    signal.set_wakeup_fd(wakeup)
    for number, handler in before.items():
        signal.signal(number, handler)
