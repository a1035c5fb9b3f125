"""What a run ran with and on, for `environment.json` and `doctor`.

In: the installed packages, the machine, the working copy. Out: plain JSON-able values, and nothing secret: environment
variables are never written.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform as python_platform
import resource
import socket
import subprocess
import sys
from pathlib import Path

import torch

from megatron_gspo import __version__
from megatron_gspo.platform import detect_machine

PACKAGES = (
    "torch",
    "megatron-core",
    "transformers",
    "safetensors",
    "tokenizers",
    "numpy",
    "transformer-engine",
    "sglang",
)


def describe_environment(num_ranks: int) -> dict[str, object]:
    """Versions, hardware and commit."""
    return {
        "megatron_gspo": __version__,
        "git_commit": git_commit(),
        "python": python_platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "machine": dataclasses.asdict(detect_machine()),
        "host": socket.gethostname(),
        "platform": python_platform.platform(),
        "num_ranks": num_ranks,
        "num_threads_a_rank": torch.get_num_threads(),
        "arguments": sys.argv[1:],
    }


def package_version(name: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit of the working copy this package runs from, with `-dirty` where it was changed; None outside one."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def peak_memory_gib() -> float:
    """Most memory this process has held: on the GPU where there is one, else resident in RAM."""
    if detect_machine().has_cuda:
        return torch.cuda.max_memory_allocated() / 2**30
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
