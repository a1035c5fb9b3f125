"""Measure the hot paths beside what one would use instead and beside what the machine can do.

    python tools/bench/run.py [ROW ...] [--rounds N] [--json FILE] [--compare FILE] [--docs FILE] [--readme FILE]

Every row runs in a process of its own, on one thread, and prints ratios: the median over the rounds and their range.
The results go to a JSON file, where a row takes the place of the one measured before and all others stay. Beside each
stands what it was made with: date, commit, machine and versions. --docs writes all rows of that file between the marks
of a document, --readme all figures that are held against something, missed or not. In there nothing is entered by hand.
Rows beside TRL and verl run in an environment that has those (`tools/bench/install_peers.sh`): its Python is
`.venv-peers/bin/python`, or what MEGATRON_GSPO_PEERS_PYTHON says. Without one they are left out, in words.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PEERS = "MEGATRON_GSPO_PEERS_PYTHON"
RESULTS = ROOT / "build/bench.json"  # git ignores it
MEASURED, HOW_FAST = "measured", "how fast"  # what the marks in --docs and --readme name
sys.path.insert(0, str(ROOT))

from tools.bench import results  # noqa: E402
from tools.bench.rows import ROWS  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what was asked for, and write it where it was asked for.

    Returns:
        0; 1 where a row failed; 2 where the command line makes no sense, before anything is measured.
    """
    arguments = parser().parse_args(argv)
    if problem := refusal(arguments):
        print(problem, file=sys.stderr)
        return 2
    # First, as the file may be the one that is written.
    baseline = results.read(arguments.compare) if arguments.compare else None
    file: Path = arguments.json or RESULTS
    rows, failed = measure_rows(arguments, file)
    if rows and baseline is not None:
        print(results.compare(rows, baseline))
    if arguments.docs or arguments.readme:
        write_documents(arguments, drawn="growth" in rows)
    for name in failed:
        print(f"{name}: failed, see above", file=sys.stderr)
    if rows:
        print(f"Results are in {file}. A later run says what moved with --compare {file}")
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="ROW", help=f"rows; all without one: {', '.join(ROWS)}")
    parser.add_argument(
        "--rounds",
        type=int,
        default=7,
        help="rounds, of which cheap figures take a multiple (default: 7); 0 only writes the documents anew",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="keep the results there, beside its other rows (default: build/bench.json)",
    )
    parser.add_argument("--compare", type=Path, metavar="FILE", help="say what moved since FILE was written")
    of_all = f"put all that --json holds between FILE's marks <!-- {MEASURED} -->"
    parser.add_argument("--docs", type=Path, metavar="FILE", help=of_all)
    of_aims = f"put its figures that are held against something between FILE's marks <!-- {HOW_FAST} -->"
    parser.add_argument("--readme", type=Path, metavar="FILE", help=of_aims)
    return parser


def refusal(arguments: argparse.Namespace) -> str | None:
    """Why these arguments cannot be followed; None where they can."""
    unknown = [name for name in arguments.names if name not in ROWS]
    if unknown:
        return f"{unknown[0]} is not a row; rows: {', '.join(ROWS)}"
    if arguments.rounds < 0:
        return f"--rounds is {arguments.rounds}; it is at least 0"
    if arguments.compare and not arguments.compare.is_file():
        return f"--compare {arguments.compare} is no file; give one that --json wrote"
    for option, section in (("docs", MEASURED), ("readme", HOW_FAST)):
        document: Path | None = getattr(arguments, option)
        if document is None:
            continue
        if not arguments.json:
            return f"--{option} shows what --json holds: give both"
        if not results.has_section(document, section):
            return f"--{option} {document} is no file with the lines <!-- {section} --> and <!-- /{section} -->"
        if arguments.rounds == 0 and not arguments.json.is_file():
            return f"--json {arguments.json} is no file, and --rounds 0 measures nothing to put there"
    return None


def measure_rows(arguments: argparse.Namespace, file: Path) -> tuple[dict[str, Any], list[str]]:
    """Measure, print and keep in `file` one row after the other.

    Returns:
        What was measured, by row; the names of the rows that failed.
    """
    rows: dict[str, Any] = {}
    failed = []
    written = [path.resolve() for path in (file, arguments.docs, arguments.readme) if path]
    for name in (arguments.names or ROWS) if arguments.rounds else ():
        peers = peers_python()
        if peers is None and ROWS[name].needs_peers:
            print(f"{name}: left out, there is no environment with the peers: bash tools/bench/install_peers.sh")
            continue
        print(f"{name}: measuring", file=sys.stderr)
        python = peers if peers is not None and ROWS[name].runs_among_peers else Path(sys.executable)
        before = made(written)  # not after it: the row is of the files that it started with
        result = measure(name, python, arguments.rounds)
        if result is None:
            failed.append(name)
            continue
        result["made"] = before | result["made"]
        if peers is not None and ROWS[name].needs_peers and python != peers:
            result["made"]["peers"] = versions(peers)
        rows[name] = result
        results.write(file, {name: result})
        print(results.markdown({name: result}))
        print(results.details({name: result}), flush=True)
    return rows, failed


def write_documents(arguments: argparse.Namespace, *, drawn: bool) -> None:
    """Put what --json holds into the documents; `drawn` says whether growth is to be drawn beside --docs."""
    kept = results.read(arguments.json)
    rows = {name: kept[name] for name in ROWS if name in kept}
    if arguments.readme:
        results.replace_section(arguments.readme, HOW_FAST, results.aims(rows))
    if arguments.docs:
        results.replace_section(arguments.docs, MEASURED, results.document(rows))
    if arguments.docs and drawn:
        picture = arguments.docs.resolve().with_name("growth.png")
        command = [sys.executable, "-m", "tools.bench.picture", str(arguments.json.resolve()), str(picture)]
        subprocess.run(command, cwd=ROOT, check=True)


def measure(name: str, python: Path, rounds: int) -> dict[str, Any] | None:
    """The result of a row; None where it failed, whose reason is on the terminal."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "result.json"
        command = [str(python), "-m", "tools.bench.child", name, str(rounds), str(file)]
        settings = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        settings |= {PEERS: str(peers)} if (peers := peers_python()) else {}
        done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, check=False)
        return json.loads(file.read_text()) if done.returncode == 0 else None


def made(written: Sequence[Path]) -> dict[str, str]:
    """When, where and from what a row is about to be measured: the commit, and whether files differ from it.

    Args:
        written: absolute paths that this program writes; what changed there changes no measurement.
    """
    others = [f":(exclude,literal){path.relative_to(ROOT)}" for path in written if path.is_relative_to(ROOT)]
    changed = git("status", "--porcelain", "--", ".", *others)
    commit = git("rev-parse", "--short", "HEAD") + (" and changes" if changed else "")
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit, "machine": machine()}


def machine() -> str:
    """The processor as its kernel names it, and how many cores of it there are."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    about = dict(line.replace("\t", "").split(": ", 1) for line in lines if ": " in line)
    model = f"family {about['cpu family']} model {about['model']}" if "cpu family" in about else platform.machine()
    return f"{os.cpu_count()} cores of {about.get('model name', 'a processor without a name')}, {model}"


def versions(python: Path) -> dict[str, str]:
    """What another interpreter has of the packages that are recorded."""
    command = "import json; from tools.bench.results import versions; print(json.dumps(versions()))"
    said = subprocess.run([str(python), "-c", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = json.loads(said)
    return found


def git(*arguments: str) -> str:
    """What git says of this repository."""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def peers_python() -> Path | None:
    """The Python that has TRL and verl."""
    python = Path(os.environ.get(PEERS, ROOT / ".venv-peers/bin/python"))
    return python if python.exists() else None


if __name__ == "__main__":
    raise SystemExit(main())
