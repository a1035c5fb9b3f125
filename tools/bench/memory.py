"""How much memory a function takes at its peak, measured by the kernel. Linux only."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path


def peak_bytes(function: Callable[[], object]) -> int:
    """Bytes of resident memory that `function` takes at its peak beyond what the process holds before it."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    before = resident_bytes("VmRSS")
    function()
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str, process: str | int = "self") -> int:
    """VmRSS (now), VmHWM (the peak) or RssFile (of files, now) of a process."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
