"""The batch scripts say what was asked for, and hold no text that a shell could run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_gspo.slurm.arguments import Submission
from megatron_gspo.slurm.plan import make_plan
from megatron_gspo.slurm.script import TEMPLATES, compare_script, train_script


def options_of(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def words_of(script: str, name: str) -> list[str]:
    """What bash makes of a variable of the script's."""
    block = script.partition("# >>> variables\n")[2].partition("# <<< variables\n")[0]
    shown = f'{block}\nfor word in "${{{name}[@]}}"; do printf "%s\\0" "$word"; done'
    return subprocess.run(["bash", "-c", shown], capture_output=True, text=True, check=True).stdout.split("\0")[:-1]


@pytest.fixture
def script(submission: Callable[..., Submission], tmp_path: Path) -> Callable[..., str]:
    return lambda *arguments: train_script(make_plan(submission(*arguments)), tmp_path / "runs")


def test_only_the_two_blocks_differ_from_the_file_in_slurm(
    script: Callable[..., str], submission: Callable[..., Submission], tmp_path: Path
):
    def outside_the_blocks(text: str) -> list[str]:
        for name in ("options", "variables"):
            before, _, rest = text.partition(f"# >>> {name}")
            text = before + rest.partition(f"# <<< {name}")[2]
        return text.splitlines()

    def names(text: str) -> set[str]:
        return {line.split("=")[0] for line in text.partition("# >>> variables\n")[2].split("# <<<")[0].splitlines()}

    filled = {
        "train.sbatch": script("--nodes", 1),
        "compare.sbatch": compare_script(make_plan(submission("--seeds", "1,2")), tmp_path / "runs"),
    }
    for name, text in filled.items():
        template = (TEMPLATES / name).read_text()
        assert outside_the_blocks(text) == outside_the_blocks(template)
        assert names(text) == names(template)


@pytest.mark.parametrize("name", ["train.sbatch", "compare.sbatch"])
def test_the_scripts_are_bash(name: str):
    subprocess.run(["bash", "-n", TEMPLATES / name], check=True)


def test_what_is_asked_of_the_scheduler(script: Callable[..., str], tmp_path: Path):
    asked = options_of(
        script(
            *("slurm.qos=high", "slurm.cpus_per_rank=8", "slurm.memory=0", "slurm.gpu_type=h100"),
            *("slurm.sbatch_options=--exclude=node7 --mail-type=END", "slurm.save_before_limit_s=600"),
            *("--nodes", 2, "--gpus-per-node", 4, "--time", "04:00:00", "--partition", "gpu", "--account", 4711),
        )
    )
    assert asked == [
        "--job-name=runs",
        "--partition=gpu",
        "--account=4711",
        "--qos=high",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=h100:4",
        "--cpus-per-task=32",
        "--mem=0",
        "--exclude=node7",
        "--mail-type=END",
        "--time=04:00:00",
        "--signal=B:USR1@600",
        "--requeue",
        "--open-mode=append",
        f'--output="{tmp_path}/runs/slurm/job_%j.log"',
    ]


def test_habits_of_clusters(script: Callable[..., str]):
    assert "--gres=gpu:4" in options_of(script("slurm.gpu_request=gres", "--gpus-per-node", 4))
    whole = options_of(script("slurm.gpu_request=none", "slurm.exclusive=on", "--gpus-per-node", 4))
    assert "--exclusive" in whole
    assert not any("gpu" in option or "cpus" in option for option in whole)
    without = script("slurm.requeue=off")
    assert "--no-requeue" in options_of(without)
    assert words_of(without, "requeue") == ["no"]


def test_pyxis_runs_every_task_in_the_image_and_shows_it_what_the_run_reads_and_writes(
    script: Callable[..., str], recipe: Path, tmp_path: Path
):
    text = script("slurm.container_mounts=/data:/data:ro", "--container", "nvcr.io#nvidia/pytorch:25.10-py3")
    image, mounts, workdir = words_of(text, "srun_options")
    assert image == "--container-image=nvcr.io#nvidia/pytorch:25.10-py3"
    shown = mounts.removeprefix("--container-mounts=").split(",")
    for path in (Path.cwd(), tmp_path / "runs", recipe.parent / "model"):
        assert any(path.is_relative_to(mount.split(":")[0]) for mount in shown), path
    assert shown[-1] == "/data:/data:ro"
    assert workdir == f"--container-workdir={Path.cwd()}"
    assert words_of(text, "python") == ["python3"]
    assert words_of(text, "container") == []


def test_servers_are_on_nodes_of_their_own_or_beside_the_ranks(script: Callable[..., str], tmp_path: Path):
    def roles(*arguments: object) -> tuple[list[str], list[str]]:
        text = script(*arguments)
        return words_of(text, "servers"), words_of(text, "rollout_nodes")

    sglang = ("rollout.engine=sglang", "parallel.data=4")
    assert roles() == (["no"], ["0"])
    assert roles(*sglang, "--nodes", 2) == (["yes"], ["0"])
    assert roles(*sglang, "--nodes", 3, "--rollout-nodes", 1) == (["yes"], ["1"])
    mounts = words_of(script(*sglang, "--container", "image"), "srun_options")[1]
    assert f"{tmp_path}/.runs.servers:{tmp_path}/.runs.servers" in mounts


def test_apptainer_is_put_before_the_program(script: Callable[..., str]):
    text = script("slurm.container_runtime=apptainer", "--container", "/images/a b.sif", "--gpus-per-node", 1)
    words = words_of(text, "container")
    assert words[:3] == ["apptainer", "exec", "--nv"]
    assert words[-3:] == ["--pwd", str(Path.cwd()), "/images/a b.sif"]
    assert words_of(text, "srun_options") == []


def test_modules_and_virtual_environments(script: Callable[..., str]):
    text = script("slurm.modules=cuda/12.8 nccl", "slurm.venv=/shared/venv")
    assert words_of(text, "modules") == ["cuda/12.8", "nccl"]
    assert words_of(text, "python") == ["/shared/venv/bin/python"]


@pytest.mark.parametrize("field", ["modules", "container", "venv"])
def test_no_value_is_read_as_shell(script: Callable[..., str], tmp_path: Path, field: str):
    variable = {"modules": "modules", "container": "srun_options", "venv": "python"}[field]
    text = script(f"slurm.{field}=$(touch {tmp_path}/owned);`touch {tmp_path}/owned`'\"")
    assert any("$(touch" in word for word in words_of(text, variable))
    assert not (tmp_path / "owned").exists()


def test_a_comparison_takes_all_runs_of_the_array_and_one_cpu(submission: Callable[..., Submission], tmp_path: Path):
    plan = make_plan(submission("slurm.partition=gpu", "slurm.compare_partition=cpu", "--seeds", "1,2"))
    train, compare = train_script(plan, tmp_path / "runs"), compare_script(plan, tmp_path / "runs")
    assert "--array=0-1" in options_of(train)
    runs = [str(tmp_path / "runs" / f"tiny_seed_{seed}") for seed in (1, 2)]
    assert words_of(train, "runs") == words_of(compare, "runs") == runs
    assert words_of(compare, "output") == [str(tmp_path / "runs/compare.html")]
    assert {"--partition=cpu", "--ntasks=1"} <= set(options_of(compare))
    assert json.dumps(options_of(compare)).count("gpu") == 0
