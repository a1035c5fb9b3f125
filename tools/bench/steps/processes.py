"""What this process and all that it has started take: a system may score responses, say, in processes beside its own.

Linux only.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from tools.bench.memory import resident_bytes

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def processor_seconds() -> float:
    """Processor time of all of them, also of those that have ended; to 10 ms for others than this one."""
    ended = os.times()
    others = 0
    for process in family()[1:]:
        fields = (process / "stat").read_text().rpartition(")")[2].split()  # a name may hold spaces
        others += sum(map(int, fields[11:15]))  # its own and its ended children's, as user and in the kernel
    return time.process_time() + ended.children_user + ended.children_system + others * _TICK_S


def peak_bytes() -> int:
    """The sum of the peaks of resident memory of all that run now.

    Files that others than this process map are left out: they are the libraries that it maps too, in the same memory.
    """
    own, *others = (int(process.name) for process in family())
    return resident_bytes("VmHWM", own) + sum(
        resident_bytes("VmHWM", other) - resident_bytes("RssFile", other) for other in others
    )


def family() -> list[Path]:
    """/proc/PID of this process, then of all that descend from it and run. None may end meanwhile."""
    found = [Path(f"/proc/{os.getpid()}")]
    for process in found:  # which grows
        for thread in sorted(process.glob("task/*/children")):
            found += [Path("/proc") / child for child in thread.read_text().split()]
    return found
