"""What is asked of SLURM, through its own programs.

In: scripts and job ids. Out: job ids and states. Only output formats that have stayed the same for many releases are read:
`sbatch --parsable` and `squeue --format`; `sacct` is not needed.
"""

from __future__ import annotations

import getpass
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_gspo.types import UserError

_FIELDS = "%i|%T|%L|%r|%o"


@dataclass(frozen=True)
class Job:
    """A job, or a task of an array, that SLURM still knows."""

    id: str  # "12", or "12_0" of an array
    state: str  # as SLURM names it: PENDING, RUNNING, ...
    time_left: str  # before the time limit: "1:02:03"
    reason: str  # why it is pending, or "None"
    script: Path


def has_sbatch() -> bool:
    """Whether jobs can be submitted from this machine."""
    return shutil.which("sbatch") is not None


def require_sbatch() -> None:
    """Raise `UserError` where jobs cannot be submitted from this machine."""
    if not has_sbatch():
        raise UserError(
            "sbatch is not on this machine; run submit on the cluster's login node, or see the script with --dry-run"
        )


def refuse_what_slurm_refuses(script: str) -> None:
    """Ask `sbatch --test-only`, which submits nothing.

    It finds what can never run: partitions, sizes, limits. Accounts and dependencies are only looked at on submission.

    Raises:
        UserError: SLURM would refuse the script, in its words.
    """
    _sbatch(["--test-only"], script)


def submit_file(script: Path, *options: str) -> str:
    """Submit a script; returns the job's id.

    Raises:
        UserError: SLURM refuses it, in its words.
    """
    printed = _sbatch(["--parsable", *options, str(script)], None)
    return printed.strip().split(";")[0]  # on a federation the cluster's name follows


def jobs_of_this_user() -> list[Job]:
    """All jobs of this user that SLURM still knows, a line for each task of an array."""
    return _jobs("--user", getpass.getuser())


def find_job(job_id: str) -> list[Job]:
    """A job, or the tasks of an array; nothing where SLURM does not know it any more."""
    return _jobs("--jobs", job_id)


def _jobs(*which: str) -> list[Job]:
    if shutil.which("squeue") is None:
        return []
    command = ["squeue", "--noheader", "--array", "--states=all", f"--format={_FIELDS}", *which]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    if asked.returncode != 0 and "Invalid job id" not in asked.stderr:
        raise UserError(f"squeue does not answer: {_words(asked.stderr)}")
    jobs = []
    for line in asked.stdout.splitlines():
        job_id, state, time_left, reason, script = line.split("|", maxsplit=4)
        jobs.append(Job(job_id, state, time_left, reason, Path(script)))
    return jobs


def _sbatch(options: Sequence[str], script: str | None) -> str:
    done = subprocess.run(["sbatch", *options], input=script, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"SLURM refuses the job: {_words(done.stderr)}{_advice(done.stderr)}; nothing was submitted")
    return done.stdout


def _words(stderr: str) -> str:
    """What a program of SLURM's complained of, in one line."""
    lines = [re.sub(r"^(\w+: )?(error: )?", "", line).strip() for line in stderr.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line)) or "it says nothing"


def _advice(stderr: str) -> str:
    """The field to change, for refusals that have one."""
    fields = {
        "account": "slurm.account",  # also where a partition does not take this one, or none
        "partition": "slurm.partition (sinfo lists them)",
        "QOS": "slurm.qos",
        "time limit": "slurm.time",
        "node count": "slurm.nodes (sinfo shows how many a partition has)",
        "node configuration": "slurm.nodes, gpus_per_node, gpu_type, cpus_per_rank or memory",
        "gres": "slurm.gpu_request and gpu_type",
    }
    named = [field for word, field in fields.items() if word.lower() in stderr.lower()]
    return f" (see {named[0]})" if named else ""
