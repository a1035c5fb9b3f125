"""Which rank this process is, and starting the ranks of a run on this machine where nobody else has.

In: the environment that torchrun or srun made, or the number of ranks and the program's own arguments. Out: this
process's place; or the exit status of the run: 0 when every rank ended well, else that of the rank that failed first.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: A run that stopped because a signal asked it to, or without a rollout engine, and that can be gone on with
#: (EX_TEMPFAIL of sysexits.h).
EXIT_STOPPED = 75

#: How long ranks get to end by themselves after one has failed, before they are killed.
GRACE_S = 2.0

#: How long what a rank says on its standard error is held. A rank that lost its peer complains at once, and the peer's
#: end is to be told first.
HOLD_S = 0.3

#: What schedulers ask a run with to save and stop.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class Place:
    """Where a process stands among the ranks of a run."""

    rank: int
    local_rank: int  # among the ranks of its machine
    world_size: int
    launched: bool  # by torchrun or srun, rather than plainly


def place_of_this_process(environment: Mapping[str, str] = os.environ) -> Place:
    """Read `environment`: torchrun's variables, else those of a task of `srun`, else a world of one."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank = int(environment["RANK"])
        return Place(rank, int(environment.get("LOCAL_RANK", rank)), int(environment["WORLD_SIZE"]), launched=True)
    # SLURM_NTASKS is also set in a batch script that runs one process; the number of a step's tasks is srun's alone.
    if "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
        rank = int(environment["SLURM_PROCID"])
        local_rank = int(environment.get("SLURM_LOCALID", rank))
        return Place(rank, local_rank, int(environment["SLURM_STEP_NUM_TASKS"]), launched=True)
    return Place(0, 0, 1, launched=False)


@dataclass(frozen=True)
class Node:
    """Which of a run's machines this is; on each one process launches the ranks."""

    index: int = 0
    count: int = 1


def node_of_this_process(environment: Mapping[str, str] = os.environ) -> Node | None:
    """The node that a launcher of ranks, started once a node by srun, is on; None in a process that is a rank itself."""
    if "RANK" in environment:
        return None
    return Node(int(environment.get("SLURM_PROCID", 0)), int(environment.get("SLURM_STEP_NUM_TASKS", 1)))


def hold_stop_signals() -> None:
    """Have `STOP_SIGNALS` wait until somebody listens: imports and models take long, and would be ended by them.

    For a process of one thread. Threads to come inherit it, those that are there would still be ended, and all with them.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def deliver_stop_signals() -> None:
    """Have those that wait, and those to come, reach their handlers. For the main thread."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def run_ranks(num_ranks: int, arguments: Sequence[str], node: Node = Node()) -> int:
    """Run `python -m megatron_gspo ARGUMENTS` as `num_ranks` ranks on this machine, and wait for them.

    They are the ranks of a run on `node.count` machines that `MASTER_ADDR` and `MASTER_PORT` tell where to meet; on a
    single one they meet by themselves. SIGINT, SIGTERM and SIGUSR1 are passed on. When a rank fails the others are ended:
    they would wait for it for ever. What a rank says on standard error is repeated here.
    """
    environment = os.environ | {
        "WORLD_SIZE": str(num_ranks * node.count),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, _num_cores() // num_ranks))),
    }
    if node.count == 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "megatron_gspo", *arguments]
    first = node.index * num_ranks
    ranks = [
        subprocess.Popen(
            command, env=environment | {"RANK": str(first + local), "LOCAL_RANK": str(local)}, stderr=subprocess.PIPE
        )
        for local in range(num_ranks)
    ]
    speakers = [threading.Thread(target=_pass_on_words, args=(rank,), daemon=True) for rank in ranks]
    for speaker in speakers:
        speaker.start()

    def pass_on(number: int, _frame: object) -> None:
        for rank in ranks:
            rank.send_signal(number)

    for number in (signal.SIGINT, *STOP_SIGNALS):
        signal.signal(number, pass_on)
    deliver_stop_signals()  # ranks that train were started while they are held, and hold them too
    try:
        return _wait(ranks, first)
    finally:
        _end(ranks)
        for speaker in speakers:
            # What a rank started may live on, and hold its standard error open.
            speaker.join(timeout=GRACE_S)


def _pass_on_words(rank: subprocess.Popen[bytes]) -> None:
    """Repeat what `rank` says on its standard error, a moment later."""
    assert rank.stderr is not None, "it is a pipe"
    while words := os.read(rank.stderr.fileno(), 1 << 16):
        time.sleep(HOLD_S)
        os.write(sys.stderr.fileno(), words)


def _wait(ranks: Sequence[subprocess.Popen[bytes]], first: int) -> int:
    while True:
        statuses = [rank.poll() for rank in ranks]
        for rank, status in enumerate(statuses, start=first):
            if status is not None and status < 0:
                name = signal.Signals(-status).name
                print(f"megatron-gspo: rank {rank} was ended by {name}; the others are ended too", file=sys.stderr)
                # Shells, too, say 128 + signal.
                return 128 - status
        failed = next((status for status in statuses if status not in (None, 0, EXIT_STOPPED)), None)
        if failed is not None:
            return failed
        ended = [status for status in statuses if status is not None]
        if len(ended) == len(ranks):
            return max(ended)
        time.sleep(0.02)


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    # Not asked with SIGTERM: that would have them finish a step, for which they need the rank that failed.
    deadline = time.monotonic() + GRACE_S
    for rank in ranks:
        try:
            rank.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()


def _num_cores() -> int:
    """The cores this process may use: a scheduler may have given it fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_port(host: str = "127.0.0.1") -> int:
    """A port of this machine that nothing listens on at this moment.

    Raises:
        OSError: this machine cannot listen on `host`.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
