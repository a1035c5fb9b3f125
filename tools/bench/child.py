"""Measures one row in a process of its own: `python -m tools.bench.child ROW ROUNDS FILE` writes the result as JSON.

The result says what it was measured with: versions are those of this interpreter, which is not always `run.py`'s.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import torch

from tools.bench import results
from tools.bench.harness import Bench


def main(row: str, rounds: str, file: str) -> None:
    """Measure `row` over `rounds` rounds."""
    torch.set_num_threads(1)
    bench = Bench(int(rounds))
    importlib.import_module(f"tools.bench.rows.{row}").measure(bench)
    result = dataclasses.asdict(bench.result) | {"made": {"versions": results.versions()}}
    Path(file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
