"""How much memory a function takes at its peak, measured by the kernel. Linux only."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path


def peak_bytes(function: Callable[[], object]) -> int:
    """Bytes of resident memory that `function` takes at its peak beyond what the process holds before it."""
    before = set_peak_back()
    function()
    return resident_bytes("VmHWM") - before


def set_peak_back() -> int:
    """Have the peak be what is resident now. Returns that, in bytes."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes("VmRSS")


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (the peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
