"""`bash tools/reproduce.sh`: plan, run, answer."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch is imported: two runs side by side beat two threads

from megatron_gspo.types import UserError
from tools.reproduce.study import FULL, QUICK, Experiment

EXIT_DONE, EXIT_REFUSED, EXIT_STOPPED = 0, 2, 75
NUMBERS = ("1", "2", "3", "4", "5", "6")


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(
        prog="reproduce.sh", description="The GSPO paper's claims, at the size of a laptop."
    )
    parser.add_argument("--quick", action="store_true", help="few runs, under 15 minutes: what can be seen with few")
    parser.add_argument("--only", metavar="CLAIM,…", help="what these claims need alone, such as 2,5")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="runs side by side, a thread each (default: CPUs, at most 2)"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: runs/study, or runs/study_quick")
    parser.add_argument("--plan", action="store_true", help="say what would run, and what it would take")
    parser.add_argument("--analyse", action="store_true", help="run nothing: answer from the runs that are there")
    parser.add_argument(
        "--publish", type=Path, metavar="DIR", help="also write RESULTS.md and results/ to this directory"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    parsed = build_parser().parse_args(arguments)
    try:
        return _reproduce(parsed)
    except UserError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return EXIT_REFUSED


def _reproduce(parsed: argparse.Namespace) -> int:
    from tools.reproduce.document import write_results
    from tools.reproduce.schedule import Schedule

    experiments = chosen(QUICK if parsed.quick else FULL, parsed.only)
    output = (parsed.output or Path("runs/study_quick" if parsed.quick else "runs/study")).resolve()
    jobs = min(2, os.cpu_count() or 1) if parsed.jobs is None else parsed.jobs
    if jobs < 1:
        raise UserError(f"--jobs is {jobs}; accepted: 1 or more")
    schedule = Schedule(experiments, output, jobs, say=lambda text: print(f"reproduce: {text}", flush=True))
    whole = True
    if not parsed.analyse:
        print(schedule.describe(), flush=True)
        if parsed.plan:
            return EXIT_DONE
        whole = schedule.run()
    command = " ".join(("bash tools/reproduce.sh", *_repeatable(parsed)))
    write_results(experiments, output, command, parsed.publish)
    return EXIT_DONE if whole else EXIT_STOPPED


def chosen(experiments: Sequence[Experiment], only: str | None) -> tuple[Experiment, ...]:
    """The experiments that the claims need.

    Raises:
        UserError: there is no such claim.
    """
    if only is None:
        return tuple(experiments)
    wanted = [number.strip() for number in only.split(",")]
    unknown = [number for number in wanted if number not in NUMBERS]
    if unknown:
        raise UserError(f"--only has {', '.join(unknown)!r}; accepted: numbers of claims, {', '.join(NUMBERS)}")
    return tuple(one for one in experiments if set(one.claims) & set(wanted))


def _repeatable(parsed: argparse.Namespace) -> list[str]:
    """The arguments that decide what runs."""
    return (["--quick"] if parsed.quick else []) + ([f"--only {parsed.only}"] if parsed.only else [])


if __name__ == "__main__":
    raise SystemExit(main())
