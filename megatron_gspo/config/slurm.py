"""The recipe's `slurm` section: what `submit` asks the scheduler for, and in what the program runs there.

Its text reaches `#SBATCH` lines and a batch script, so `check_slurm` takes only characters that mean nothing there.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from megatron_gspo.config.refusal import Refusal, not_accepted
from megatron_gspo.config.section import NonNegative, Positive, PositiveFloat, Section, Switch, TextPath


def _number_as_text(value: object) -> object:
    """Accounts, partitions and times may be numbers to YAML: 30 minutes, project 4711."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


SchedulerText = Annotated[str, BeforeValidator(_number_as_text)]


class SlurmSection(Section):
    """A job's resources, how it goes on after its time limit, and its environment."""

    nodes: Positive = 1
    """All nodes of the job, those for SGLang servers among them."""
    rollout_nodes: NonNegative = 0
    """With `rollout.engine: sglang`, how many of `nodes`, the last ones, are for servers alone. 0 has servers on every node,
    on the ranks' own GPUs: they hold `rollout.sglang.memory_fraction` of the memory for good, and ranks get the rest."""
    gpus_per_node: NonNegative = 0
    """Ranks a node, one a GPU. 0 asks for none: ranks run on CPUs, `parallel`'s world size over `nodes` on each."""
    gpu_request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """How GPUs are asked for: `--gpus-per-node`, `--gres` where a cluster knows only that, or not at all, where a
    partition gives whole nodes."""
    gpu_memory_gib: PositiveFloat | None = None
    """Memory of one GPU in GiB, for a warning where the recipe will not fit; null makes no estimate."""
    gpu_type: SchedulerText | None = None
    """The type in the request: `h100` asks for gpu:h100:8."""
    cpus_per_rank: Positive = 1
    """CPU cores for each rank; not asked for under `exclusive`."""
    memory: SchedulerText | None = None
    """Memory a node, as `--mem` takes it: 200G; 0 for all of it. null leaves it to the cluster."""
    exclusive: Switch = False
    """Take whole nodes."""
    time: SchedulerText | None = None
    """Time limit of one run of the job, as `--time` takes it: 04:00:00, 1-00:00:00, or minutes. null: the partition's."""
    partition: SchedulerText | None = None
    account: SchedulerText | None = None
    qos: SchedulerText | None = None
    constraint: SchedulerText | None = None
    reservation: SchedulerText | None = None
    job_name: SchedulerText | None = None
    """null takes the output directory's name."""
    sbatch_options: str | None = None
    """Any other options, as on sbatch's command line: `--exclude=node7 --mail-type=END`."""
    compare_partition: SchedulerText | None = None
    """Where the comparison of an array's runs is drawn, on one CPU; null takes `partition`."""
    save_before_limit_s: Annotated[int, Field(ge=1, le=65535)] = 300
    """Seconds before the time limit at which the job is told to save and go on later: a step and a save must fit."""
    requeue: Switch = True
    """Go on by requeueing the same job; off, or where the cluster refuses that, by a new job that follows this one."""
    max_requeues: NonNegative = 50
    """How often a job may start again, for whatever reason."""
    modules: str | None = None
    """Environment modules to load, separated by spaces."""
    venv: TextPath | None = None
    """Virtual environment to run in; null takes the Python that `submit` runs in, which the nodes must see too."""
    container: str | None = None
    """Image to run in: a file (.sqsh, .sif) or a registry's name. The program comes from the directory of `submit`."""
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """What runs the image: SLURM's plugin Pyxis (with Enroot), or Apptainer."""
    container_mounts: str | None = None
    """More directories to show the container, as `from:to,from:to`. Where `submit` runs, the output directory, the
    model and the data files are shown already."""


_WORDS = ("gpu_type", "memory", "time", "partition", "account", "qos", "constraint", "reservation", "job_name")
_WORD = re.compile(r"[A-Za-z0-9_.,:@%+=/&|()\[\]*-]+")
_PRINTABLE = ("modules", "sbatch_options", "container", "container_mounts", "venv")


def check_slurm(section: SlurmSection) -> Iterator[Refusal]:
    """What is wrong with the text in the section, and with its sizes."""
    if section.rollout_nodes >= section.nodes:
        yield not_accepted(
            "slurm.rollout_nodes", section.rollout_nodes, f"less than slurm.nodes ({section.nodes}): ranks need one too"
        )
    for name in (*_WORDS, "compare_partition"):
        text = getattr(section, name)
        if text is not None and not _WORD.fullmatch(text):
            yield not_accepted(f"slurm.{name}", text, "one word of letters, digits and _.,:@%+=/&|()[]*-")
    for name in _PRINTABLE:
        text = getattr(section, name)
        if text is not None and not str(text).isprintable():
            yield not_accepted(f"slurm.{name}", str(text), "one line of printable characters")
    yield from _check_sbatch_options(section.sbatch_options)
    limit_s = _seconds(section.time) if section.time is not None else None
    if limit_s is not None and section.save_before_limit_s >= limit_s:
        yield not_accepted(
            "slurm.save_before_limit_s", section.save_before_limit_s, f"less than the time limit, {limit_s} s"
        )


def _seconds(time: str) -> int | None:
    """A time limit as sbatch takes it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S. None for what is for sbatch to refuse."""
    days, dash, clock = time.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdecimal() for part in parts) or len(parts) > 3 or (dash and not days.isdecimal()):
        return None
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(int(part) * unit for part, unit in zip(parts, units, strict=False))


def _check_sbatch_options(text: str | None) -> Iterator[Refusal]:
    accepted = "options as --name=value, separated by spaces, without quotes or # inside"
    try:
        options = shlex.split(text or "")
    except ValueError:
        yield not_accepted("slurm.sbatch_options", text, accepted)
        return
    for option in options:
        if not option.startswith("--") or re.search(r"[\"'\\#\s]", option):
            yield not_accepted("slurm.sbatch_options", text, accepted)
            return
