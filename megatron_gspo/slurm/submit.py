"""`megatron-gspo submit`: look at everything that can be wrong, then submit.

In: what was asked for. Out: a job, or an array of runs and the job that compares them; or one line that says why not, and
nothing submitted, nothing written.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from megatron_gspo.config import dump_recipe
from megatron_gspo.report.metrics import make_writable_directory
from megatron_gspo.slurm import scheduler
from megatron_gspo.slurm.arguments import Submission
from megatron_gspo.slurm.plan import Plan, make_plan
from megatron_gspo.slurm.script import compare_script, train_script
from megatron_gspo.slurm.status import COMPARISON_NOTE, RUN_NOTE
from megatron_gspo.types import UserError

#: File systems that are a single machine's memory.
IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")


def submit(submission: Submission) -> None:
    """Check, then submit or, on a dry run, print what would be submitted.

    Raises:
        UserError: the recipe, the layout, the directory or SLURM says no.
    """
    plan = make_plan(submission)
    scripts = {"train.sbatch": train_script(plan, submission.output_dir)}
    if len(plan.runs) > 1:
        scripts["compare.sbatch"] = compare_script(plan, submission.output_dir)
    for remark in (*plan.remarks, *_remarks_on_directory(submission.output_dir, plan)):
        print(f"megatron-gspo: {remark}", file=sys.stderr)
    if submission.dry_run and not scheduler.has_sbatch():
        print("megatron-gspo: sbatch is not on this machine, and was not asked", file=sys.stderr)
    else:
        scheduler.require_sbatch()
        for script in scripts.values():
            scheduler.refuse_what_slurm_refuses(script)
    if submission.dry_run:
        _print_scripts(submission.output_dir, scripts)
        return
    job_directory = submission.output_dir / "slurm"
    try:
        _write(job_directory, scripts, plan)
        job = scheduler.submit_file(job_directory / "train.sbatch")
    except UserError:
        _take_back(submission.output_dir, plan)
        raise
    _note_jobs(plan, job)
    _say_submitted(plan, job, submission.output_dir)
    if "compare.sbatch" in scripts:
        _submit_comparison(job_directory, job)
    print(f"Next: megatron-gspo status {submission.output_dir}")


def _print_scripts(output_dir: Path, scripts: Mapping[str, str]) -> None:
    """What would run, exactly; several scripts with a line between them."""
    for number, (name, text) in enumerate(scripts.items()):
        if number:
            print(f"\n# ----- {output_dir / 'slurm' / name}, submitted with --dependency=afterany:ARRAY -----\n")
        print(text, end="")


def _write(job_directory: Path, scripts: Mapping[str, str], plan: Plan) -> None:
    """Put the scripts and recipes where the job finds them."""
    make_writable_directory(job_directory)
    for name, text in scripts.items():
        (job_directory / name).write_text(text)
        (job_directory / name).chmod(0o755)
    for run in plan.runs:
        make_writable_directory(run.directory / "slurm")
        (run.directory / "slurm" / "recipe.yaml").write_text(dump_recipe(run.recipe))


def _take_back(output_dir: Path, plan: Plan) -> None:
    """Remove what was written for a job that was refused."""
    for directory in (*(run.directory for run in plan.runs), output_dir):
        shutil.rmtree(directory / "slurm", ignore_errors=True)
        if directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()


def _note_jobs(plan: Plan, job: str) -> None:
    """Leave each run's job in its directory."""
    for number, run in enumerate(plan.runs):
        _leave_note(run.directory / RUN_NOTE, f"{job}_{number}" if len(plan.runs) > 1 else job)


def _leave_note(note: Path, job: str) -> None:
    """Note a job's id, unless it has started and done so itself."""
    if not note.exists():
        note.write_text(job + "\n")


def _submit_comparison(job_directory: Path, job: str) -> None:
    # afterany: also when a run has failed, so it never waits for what cannot come.
    options = (f"--dependency=afterany:{job}", "--kill-on-invalid-dep=yes")
    try:
        comparison = scheduler.submit_file(job_directory / "compare.sbatch", *options)
    except UserError as error:
        raise UserError(f"job {job} trains the runs, but their comparison was not submitted: {error}") from error
    _leave_note(job_directory.parent / COMPARISON_NOTE, comparison)
    print(f"Submitted job {comparison}: compares them once all have ended: {job_directory.parent / 'compare.html'}")


def _say_submitted(plan: Plan, job: str, output_dir: Path) -> None:
    slurm, runs = plan.recipe.slurm, plan.runs
    what = f"{len(runs)} runs of " if len(runs) > 1 else ""
    each = (
        _counted(slurm.gpus_per_node, "GPU")
        if slurm.gpus_per_node
        else f"{_counted(plan.ranks_per_node, 'rank')} on CPUs"
    )
    nodes, steps = _counted(slurm.nodes, "node"), _counted(plan.recipe.training.steps, "step")
    print(f"Submitted job {job}: {what}{nodes} × {each}, {steps}")
    print(f"Results: {output_dir}; what it says: {output_dir / 'slurm'}")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _remarks_on_directory(output_dir: Path, plan: Plan) -> list[str]:
    if plan.recipe.slurm.nodes == 1:
        return []
    kind = _file_system_of(output_dir)
    if kind not in IN_MEMORY:
        return []
    return [f"{output_dir} is in this machine's memory ({kind}); nodes that do not see it will refuse to start"]


def _file_system_of(path: Path) -> str | None:
    """The kind of file system that `path` is, or will be, on; None where this machine does not say."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return None
    kinds = {Path(words[1]): words[2] for words in map(str.split, mounts.read_text().splitlines())}
    return next((kinds[above] for above in (path, *path.parents) if above in kinds), None)
