"""Measure the hot paths beside what one would use instead and beside what the machine can do.

    python tools/bench/run.py [NAME ...] [--rounds N] [--json FILE] [--compare FILE] [--docs FILE]

Every row runs in a process of its own, on one thread, and prints ratios: the median over the rounds and their range.
With --json a row takes the place of the one measured before, beside its date, commit and rounds, and --docs shows all that
the file holds: nothing is entered by hand. Rows beside TRL and verl run in an environment that has those (`tools/bench/install_peers.sh`); its Python is
`.venv-peers/bin/python`, or what MEGATRON_GSPO_PEERS_PYTHON says, and without one they are left out, in words.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PEERS = "MEGATRON_GSPO_PEERS_PYTHON"
sys.path.insert(0, str(ROOT))

from tools.bench import results  # noqa: E402
from tools.bench.rows import ROWS  # noqa: E402


def main() -> int:
    """Measure what was asked for."""
    arguments = parser().parse_args()
    if arguments.docs and not arguments.json:
        print("--docs shows what --json holds: give both", file=sys.stderr)
        return 2
    unknown = [name for name in arguments.names if name not in ROWS]
    if unknown:
        print(f"{unknown[0]} is not a row; rows: {', '.join(ROWS)}", file=sys.stderr)
        return 2
    rows, failed = {}, []
    for name in arguments.names or ROWS:
        peers = peers_python()
        if peers is None and ROWS[name].needs_peers:
            print(f"{name}: left out, there is no environment with the peers: bash tools/bench/install_peers.sh")
            continue
        print(f"{name}: measuring", file=sys.stderr)
        python = peers if peers is not None and ROWS[name].runs_among_peers else Path(sys.executable)
        result = measure(name, python, arguments.rounds)
        if result is None:
            failed.append(name)
            continue
        rows[name] = result
        rows[name]["made"] = made(arguments.rounds)
        if arguments.json:
            results.write(arguments.json, rows, environment())
        print(results.markdown({name: result}))
        print(results.details({name: result}), flush=True)
    if arguments.compare:
        print(results.compare(rows, results.read(arguments.compare)))
    if arguments.docs:
        shown = results.read(arguments.json)
        in_order = {name: shown[name] for name in ROWS if name in shown}
        table = f"{results.markdown(in_order)}\n\n{results.provenance(in_order)}"
        results.replace_section(arguments.docs, "measured", table)
        if "growth" in rows:  # a picture is drawn from what was measured just now
            picture = [
                sys.executable,
                "-m",
                "tools.bench.picture",
                arguments.json,
                arguments.docs.with_name("growth.png"),
            ]
            subprocess.run(list(map(str, picture)), cwd=ROOT, check=True)
    for name in failed:
        print(f"{name}: failed, see above", file=sys.stderr)
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"rows; all without one: {', '.join(ROWS)}")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of every row (default: 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the results there; other rows in it stay")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="say what moved since FILE was written")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="put the table of --json between FILE's marks")
    return parser


def measure(name: str, python: Path, rounds: int) -> dict[str, Any] | None:
    """The result of a row; None where it failed, whose reason is on the terminal."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "result.json"
        command = [str(python), "-m", "tools.bench.child", name, str(rounds), str(file)]
        settings = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        settings |= {PEERS: str(peers)} if (peers := peers_python()) else {}
        done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, check=False)
        return json.loads(file.read_text()) if done.returncode == 0 else None


def made(rounds: int) -> dict[str, object]:
    """When, where and from what a row is measured: the commit, and whether files differ from it."""
    commit = git("rev-parse", "--short", "HEAD") + (" and changes" if git("status", "--porcelain") else "")
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit, "rounds": rounds, "machine": machine()}


def machine() -> str:
    """The processor as its kernel names it, and how many cores of it there are."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    about = dict(line.replace("\t", "").split(": ", 1) for line in lines if ": " in line)
    model = f"family {about['cpu family']} model {about['model']}" if "cpu family" in about else platform.machine()
    return f"{os.cpu_count()} cores of {about.get('model name', 'a processor without a name')}, {model}"


def git(*arguments: str) -> str:
    """What git says of this repository."""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def peers_python() -> Path | None:
    """The Python that has TRL and verl."""
    python = Path(os.environ.get(PEERS, ROOT / ".venv-peers/bin/python"))
    return python if python.exists() else None


def environment() -> dict[str, object]:
    """What was measured with."""
    packages = ("torch", "transformers", "megatron-core", "numpy")
    return {"python": sys.version.split()[0], "cores": os.cpu_count()} | {name: version(name) for name in packages}


if __name__ == "__main__":
    raise SystemExit(main())
