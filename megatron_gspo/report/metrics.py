"""Writes the run directory.

    recipe.yaml        the recipe, fully resolved
    environment.json   versions, hardware, git commit
    metrics.jsonl      one JSON object a step, flat keys; `step` and `policy_version` in each
    log.txt            what the program said, with times
    tensorboard/       the same metrics as TensorBoard events
    volatility/        step_*.npz, how routes changed: arrays named measurement/array (docs/volatility.md)
    checkpoints/       step_*, to go on from, and hf_step_*, the policy as a Hugging Face checkpoint
    environment_after_step_*.json  the same as environment.json, for each time the run went on

In: flat metric dictionaries. Out: the files, each line whole and flushed when `write` returns.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

from megatron_gspo.types import UserError

# The closing words of log.txt; a process that was killed leaves none.
ENDED_BY = "the run ended by"
ENDED_IN_ORDER = "the run ended in order"


@dataclass
class RunDirectory:
    """An open run directory, on rank 0."""

    path: Path
    metrics_file: TextIO
    log: logging.Handler
    tensorboard: SummaryWriter | None
    wandb_run: Any | None

    @classmethod
    def create(
        cls,
        path: Path,
        recipe_yaml: str,
        environment: Mapping[str, object],
        *,
        tensorboard: bool = True,
        wandb_project: str | None = None,
    ) -> RunDirectory:
        """Start a run in `path`.

        Raises:
            UserError: `path` holds a run already, or cannot be written.
        """
        refuse_used_directory(path)
        (path / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")
        return cls._open(path, recipe_yaml, 0, tensorboard=tensorboard, wandb_project=wandb_project)

    @classmethod
    def go_on(
        cls,
        path: Path,
        recipe_yaml: str,
        environment: Mapping[str, object],
        last_line: Mapping[str, float | int],
        *,
        record_line: bool = True,
        tensorboard: bool = True,
        wandb_project: str | None = None,
    ) -> RunDirectory:
        """Go on with the run in `path` after the step of `last_line`, its line of metrics; later lines are taken back.

        The line itself is written where the run ended before it could be; not `record_line` leaves it to the caller.
        """
        step = int(last_line["step"])
        kept = _lines_up_to(path / "metrics.jsonl", step)
        aside = path / ".metrics.jsonl.part"
        aside.write_text("".join(kept))
        aside.rename(path / "metrics.jsonl")
        (path / f"environment_after_step_{step}.json").write_text(json.dumps(environment, indent=2) + "\n")
        directory = cls._open(path, recipe_yaml, step, tensorboard=tensorboard, wandb_project=wandb_project)
        if record_line and (not kept or json.loads(kept[-1])["step"] < step):
            directory.write(last_line)
        return directory

    @classmethod
    def _open(
        cls, path: Path, recipe_yaml: str, after_step: int, *, tensorboard: bool, wandb_project: str | None
    ) -> RunDirectory:
        log = logging.FileHandler(path / "log.txt")
        log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(log)
        (path / "recipe.yaml").write_text(recipe_yaml)
        writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # TensorBoard hides what it holds of later steps.
            writer = SummaryWriter(str(path / "tensorboard"), purge_step=after_step + 1 if after_step else None)
        wandb_run = None
        if wandb_project is not None:
            wandb_run = _start_wandb(wandb_project, path, recipe_yaml)
        return cls(path, (path / "metrics.jsonl").open("a"), log, writer, wandb_run)

    def write(self, metrics: Mapping[str, float | int]) -> None:
        """Append one step's metrics. A value that is not finite is written as null: JSON has no NaN."""
        whole = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self.metrics_file.write(json.dumps(whole) + "\n")
        self.metrics_file.flush()
        step = int(metrics["step"])
        if self.tensorboard is not None:
            for name, value in metrics.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb_run is not None:
            self.wandb_run.log(dict(metrics), step=step)

    def write_volatility(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep a step's volatility arrays in `volatility/step_{step}.npz`, which is whole or not there."""
        directory = self.path / "volatility"
        directory.mkdir(exist_ok=True)
        aside = directory / f".step_{step}.npz.part"
        with aside.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        aside.rename(directory / f"step_{step}.npz")

    def close(self) -> None:
        """Flush and close everything; log.txt's last line says whether in order, or as an exception passes through."""
        failure = sys.exc_info()[1]
        how = ENDED_IN_ORDER
        if failure is not None:
            first_line = (str(failure).strip().splitlines() or [""])[0]
            how = f"{ENDED_BY} {type(failure).__name__}: {first_line}"
        # Straight to the file: it must not depend on the level that some logger is set to.
        self.log.handle(logging.makeLogRecord({"name": __name__, "levelname": "INFO", "msg": how}))
        self.metrics_file.close()
        logging.getLogger().removeHandler(self.log)
        self.log.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()


def has_metrics(path: Path) -> bool:
    """Whether a step of the run in `path` has been recorded."""
    metrics = path / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_size > 0


def refuse_used_directory(path: Path) -> None:
    """Raise `UserError` where `path` holds a run, or cannot be written: a run never overwrites another."""
    if has_metrics(path):
        raise UserError(
            f"--output-dir: {path} holds a run already (metrics.jsonl); name a new directory, or go on with --resume"
        )
    make_writable_directory(path)


def refuse_used_checkpoint(path: Path) -> None:
    """Raise `UserError` where `path` holds something already, or cannot be written."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--output-dir: {path} exists already; name a new directory, or remove it")
    make_writable_directory(path)


def make_writable_directory(path: Path) -> None:
    """Make a directory, with its parents, and see that files can be made in it.

    Raises:
        UserError: they cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"--output-dir: {path} cannot be written ({error.strerror}); accepted: a directory") from error


def read_metrics_file(file: Path) -> tuple[list[dict[str, float | None]], bool]:
    """The lines of a run's `metrics.jsonl`, and whether a half-written one follows them, which is left out.

    Raises:
        UserError: a whole line is broken, naming it.
    """
    *whole, rest = file.read_text(encoding="utf-8", errors="replace").split("\n")
    lines = []
    for number, text in enumerate(whole, start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise UserError(f"{file}:{number} is not JSON: {error}") from error
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise UserError(f"{file}:{number} is no step's metrics; accepted: a JSON object with a number `step`")
        lines.append(line)
    return lines, bool(rest)


def _lines_up_to(path: Path, step: int) -> list[str]:
    """The whole lines of `metrics.jsonl` of steps up to `step`; a line that was being written is none."""
    if not path.exists():
        return []
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in whole if json.loads(line)["step"] <= step]


def _start_wandb(project: str, path: Path, recipe_yaml: str) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "logging.wandb_project: Weights & Biases is not installed; pip install 'megatron-gspo[wandb]'"
        ) from error
    import yaml

    return wandb.init(project=project, name=path.name, dir=str(path), config=yaml.safe_load(recipe_yaml))
