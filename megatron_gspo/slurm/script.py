"""The batch scripts of `slurm/`, with their two blocks filled in.

In: a plan. Out: text; everything outside the blocks is the file's own, so that what is submitted is what can be read there.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_gspo.config import Recipe, SlurmSection
from megatron_gspo.slurm.plan import Plan
from megatron_gspo.slurm.roles import servers_directory, starts_servers
from megatron_gspo.types import UserError

TEMPLATES = Path(__file__).parents[2] / "slurm"

ScriptValue = str | int | Path | Sequence[str | Path]


def train_script(plan: Plan, output_dir: Path) -> str:
    """`slurm/train.sbatch` for the plan's runs."""
    slurm = plan.recipe.slurm
    job_directory = output_dir / "slurm"
    array = len(plan.runs) > 1
    log = job_directory / ("job_%A_%a.log" if array else "job_%j.log")
    options = [
        *_common_options(slurm, slurm.job_name or _as_job_name(output_dir.name), slurm.partition),
        f"--nodes={slurm.nodes}",
        "--ntasks-per-node=1",
        *_size_options(slurm, plan.ranks_per_node),
        *([f"--time={slurm.time}"] if slurm.time else []),
        f"--signal=B:USR1@{slurm.save_before_limit_s}",
        "--requeue" if slurm.requeue else "--no-requeue",
        "--open-mode=append",
        f'--output="{log}"',
        *([f"--array=0-{len(plan.runs) - 1}"] if array else []),
    ]
    variables: dict[str, ScriptValue] = {
        "script": job_directory / "train.sbatch",
        "runs": [run.directory for run in plan.runs],
        "python": python_of(slurm),
        "ranks_per_node": plan.ranks_per_node,
        "servers": "yes" if starts_servers(plan.recipe) else "no",
        "rollout_nodes": slurm.rollout_nodes,
        **_environment_variables(plan, output_dir),
        "requeue": "yes" if slurm.requeue else "no",
        "max_requeues": slurm.max_requeues,
    }
    return _filled(TEMPLATES / "train.sbatch", options, variables)


def compare_script(plan: Plan, output_dir: Path) -> str:
    """`slurm/compare.sbatch` for the plan's runs."""
    slurm = plan.recipe.slurm
    name = f"compare-{slurm.job_name or _as_job_name(output_dir.name)}"
    options = [
        *_common_options(slurm, name, slurm.compare_partition or slurm.partition),
        "--nodes=1",
        "--ntasks=1",
        "--time=00:30:00",
        "--open-mode=append",
        f'--output="{output_dir / "slurm" / "compare_%j.log"}"',
    ]
    variables: dict[str, ScriptValue] = {
        "script": output_dir / "slurm" / "compare.sbatch",
        "runs": [run.directory for run in plan.runs],
        "output": output_dir / "compare.html",
        "python": python_of(slurm),
        **_environment_variables(plan, output_dir),
    }
    return _filled(TEMPLATES / "compare.sbatch", options, variables)


def python_of(slurm: SlurmSection) -> str:
    """The interpreter that runs the program on the nodes."""
    if slurm.venv is not None:
        return str(slurm.venv / "bin" / "python")
    return "python3" if slurm.container else sys.executable


def _as_job_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name) or "gspo"


def _common_options(slurm: SlurmSection, name: str, partition: str | None) -> list[str]:
    given = {"partition": partition, "account": slurm.account, "qos": slurm.qos, "reservation": slurm.reservation}
    options = [f"--{option}={value}" for option, value in given.items() if value is not None]
    return [f"--job-name={name}", *options]


def _size_options(slurm: SlurmSection, ranks_per_node: int) -> list[str]:
    """What is asked of each node."""
    options = []
    gpus = f"{slurm.gpu_type}:{slurm.gpus_per_node}" if slurm.gpu_type else str(slurm.gpus_per_node)
    if slurm.gpus_per_node and slurm.gpu_request == "gpus-per-node":
        options.append(f"--gpus-per-node={gpus}")
    elif slurm.gpus_per_node and slurm.gpu_request == "gres":
        options.append(f"--gres=gpu:{gpus}")
    options.append("--exclusive" if slurm.exclusive else f"--cpus-per-task={ranks_per_node * slurm.cpus_per_rank}")
    if slurm.memory is not None:
        options.append(f"--mem={slurm.memory}")
    if slurm.constraint is not None:
        options.append(f"--constraint={slurm.constraint}")
    return options + shlex.split(slurm.sbatch_options or "")


def _environment_variables(plan: Plan, output_dir: Path) -> dict[str, ScriptValue]:
    """Modules, and the words that put the program into a container."""
    slurm = plan.recipe.slurm
    srun_options: list[str] = []
    container: list[str] = []
    if slurm.container is not None:
        shown = shown_to_the_container(plan.recipe, output_dir, is_array=len(plan.runs) > 1)
        mounts = [f"{path}:{path}" for path in shown]
        mounts += [slurm.container_mounts] if slurm.container_mounts else []
        if slurm.container_runtime == "pyxis":
            srun_options = [
                f"--container-image={slurm.container}",
                f"--container-mounts={','.join(mounts)}",
                f"--container-workdir={Path.cwd()}",
            ]
        else:
            gpus = ["--nv"] if slurm.gpus_per_node else []
            container = [
                "apptainer",
                "exec",
                *gpus,
                "--bind",
                ",".join(mounts),
                "--pwd",
                str(Path.cwd()),
                slurm.container,
            ]
    return {"modules": (slurm.modules or "").split(), "srun_options": srun_options, "container": container}


def shown_to_the_container(recipe: Recipe, output_dir: Path, *, is_array: bool) -> list[Path]:
    """The directories a run reads and writes; one inside another is left to the outer one."""
    files = [Path(data) for data in (recipe.data.train, recipe.data.eval) if data is not None]
    wanted = {Path.cwd(), output_dir, recipe.model.path, *(file.parent for file in files if file.is_absolute())}
    if starts_servers(recipe) and not is_array:
        wanted.add(servers_directory(output_dir))  # an array's lie in its output directory
    return sorted(path for path in wanted if not any(other in path.parents for other in wanted))


def _filled(template: Path, options: Sequence[str], variables: Mapping[str, ScriptValue]) -> str:
    """The template with its two blocks replaced. Values are quoted: none of them is ever read as shell."""
    try:
        text = template.read_text()
    except FileNotFoundError as error:
        raise UserError(
            f"{template} does not exist: submit needs the project's working copy (pip install -e .)"
        ) from error
    text = _with_block(text, "options", [f"#SBATCH {option}" for option in options])
    return _with_block(text, "variables", [f"{name}={_quoted(value)}" for name, value in variables.items()])


def _quoted(value: ScriptValue) -> str:
    if isinstance(value, str | int | Path):
        return shlex.quote(str(value))
    return f"({' '.join(shlex.quote(str(word)) for word in value)})"


def _with_block(text: str, name: str, lines: Sequence[str]) -> str:
    begin, end = f"# >>> {name}\n", f"# <<< {name}\n"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    assert before and after, f"the script has a block called {name}"
    return f"{before}{begin}{''.join(f'{line}' + chr(10) for line in lines)}{end}{after}"
