"""The arguments of `submit` and `status`. Imports nothing heavy: the program's `--help` reads it too."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

#: Options that are short for a field of the recipe's `slurm` section.
SHORT_FOR = {
    "--nodes": "nodes",
    "--rollout-nodes": "rollout_nodes",
    "--gpus-per-node": "gpus_per_node",
    "--gpu-memory-gib": "gpu_memory_gib",
    "--time": "time",
    "--partition": "partition",
    "--account": "account",
    "--container": "container",
}


@dataclass(frozen=True)
class Submission:
    """What `submit` was asked for."""

    recipe: Path
    arms: tuple[Path, ...]  # recipes beside `recipe`, each trained as well
    seeds: tuple[int, ...]  # empty for the recipe's own
    overrides: tuple[str, ...]
    output_dir: Path  # absolute
    dry_run: bool

    @property
    def is_comparison(self) -> bool:
        """Whether this is an array of runs to compare, rather than a single run."""
        return bool(self.arms or self.seeds)


def add_submit(parser: argparse.ArgumentParser) -> None:
    """Add `submit`'s arguments after the recipe and its overrides."""
    parser.add_argument("--output-dir", type=Path, metavar="RUN", help="the run directory; default: runs/RECIPE's name")
    for option, field in SHORT_FOR.items():
        parser.add_argument(option, dest=f"slurm_{field}", metavar=field.upper(), help=f"short for slurm.{field}=...")
    parser.add_argument("--seeds", metavar="1,2,3", help="train with each of these seeds, then compare")
    parser.add_argument("--arms", metavar="A.yaml,B.yaml", help="train these recipes beside RECIPE, then compare")
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, and submit nothing")


def add_status(parser: argparse.ArgumentParser) -> None:
    """Add `status`'s argument."""
    parser.add_argument(
        "target", nargs="?", metavar="RUN | JOB", help="a run's or comparison's directory, or a job; default: all jobs"
    )


def read_submit(parsed: argparse.Namespace) -> Submission:
    """What the parsed arguments ask for.

    Raises:
        UserError: `--seeds` are no numbers.
    """
    short = [
        f"slurm.{field}={getattr(parsed, f'slurm_{field}')}"
        for field in SHORT_FOR.values()
        if getattr(parsed, f"slurm_{field}") is not None
    ]
    arms = tuple(Path(arm) for arm in parsed.arms.split(",")) if parsed.arms else ()
    output_dir = parsed.output_dir or Path("runs") / parsed.recipe.stem
    return Submission(
        recipe=parsed.recipe,
        arms=tuple(arm for arm in dict.fromkeys(arms) if arm.resolve() != parsed.recipe.resolve()),
        seeds=_seeds(parsed.seeds),
        overrides=(*parsed.overrides, *short),
        output_dir=Path(output_dir).expanduser().resolve(),
        dry_run=parsed.dry_run,
    )


def _seeds(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    seeds = text.split(",")
    if not all(seed.strip().isdecimal() for seed in seeds) or len(set(seeds)) < len(seeds):
        from megatron_gspo.types import UserError  # brings NumPy, which `--help` does without

        raise UserError(f"--seeds is {text!r}; accepted: different whole numbers separated by commas: 1,2,3")
    return tuple(int(seed) for seed in seeds)
