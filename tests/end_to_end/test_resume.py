"""A run that is stopped, killed or damaged, and gone on with: nothing is lost and nothing is computed differently.

What the program's launcher does with its ranks is tested on ranks that it started; all other runs are forked.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gspo.training.checkpoint_store import damaged_files
from megatron_gspo.training.stopping import SAME_REQUEST_S
from tests.end_to_end.program import Program
from tests.tiny_model import tiny_recipe, write_tiny_model

UNTIMED = ("time/", "throughput/", "memory/")


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_gspo", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def lines_of(directory: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(UNTIMED)} for line in lines]


def wait_for_step(directory: Path, step: int, has_ended: Callable[[], bool]) -> None:
    while not (directory / "metrics.jsonl").exists() or len(lines_of_so_far(directory)) <= step:
        assert not has_ended()
        time.sleep(0.02)


def lines_of_so_far(directory: Path) -> list[str]:
    return (directory / "metrics.jsonl").read_text().splitlines()


def same_state(one: Path, other: Path) -> None:
    """Both checkpoints hold the same tensors, moments, generators and cursor, bit for bit."""
    files = {path.name for path in one.iterdir()}
    assert files == {path.name for path in other.iterdir()}
    parts = sorted(name for name in files if name.endswith(".distcp"))
    assert len(parts) >= 2
    for name in (*parts, "common.pt", "random.pt"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    states = [json.loads((path / "state.json").read_text()) for path in (one, other)]
    for name in ("step", "policy_version", "num_updates", "skipped_total", "prompts"):
        assert states[0][name] == states[1][name]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("recipe")
    write_tiny_model(directory / "model")
    text = tiny_recipe(
        directory / "model",
        training={"steps": 6, "save_every": 3},
        parallel={"data": 2},
        evaluation={"prompts": 2},
        # Groups of equal rewards are dropped, so that each step draws another number of prompts.
        rollout={"responses_per_prompt": 2, "dynamic_sampling_rounds": 2},
        reward={"name": "tests.end_to_end.length_reward:even_length", "overlong_buffer_tokens": 3},
    )
    (directory / "tiny.yaml").write_text(text)
    return directory / "tiny.yaml"


@pytest.fixture(scope="module")
def uninterrupted(recipe: Path, program: Program) -> Path:
    directory = recipe.parent / "uninterrupted"
    done = program.run("train", recipe, "--output-dir", directory, num_ranks=2)
    assert done.returncode == 0, done.stderr
    return directory


def test_six_steps_equal_three_steps_a_kill_and_three_more(
    recipe: Path, uninterrupted: Path, program: Program, tmp_path: Path
):
    directory = tmp_path / "run"
    killed = program.start("train", recipe, "--output-dir", directory, num_ranks=2)
    wait_for_step(directory, 4, killed.has_ended)  # past step 3: step 4 is made again
    while not (directory / "checkpoints" / "latest").exists():  # written beside the run
        assert not killed.has_ended()
        time.sleep(0.02)
    killed.kill()
    done = program.run("train", directory / "recipe.yaml", "--output-dir", directory, "--resume", num_ranks=2)
    assert done.returncode == 0, done.stderr
    assert f"going on from {directory}/checkpoints/step_3, after step 3 of 6" in done.stderr
    assert lines_of(directory) == lines_of(uninterrupted)
    assert any(line["grad_norm"] > 0 for line in lines_of(directory)[1:])
    assert len({line["groups/num_dropped"] for line in lines_of(directory)[1:]}) > 1
    same_state(uninterrupted / "checkpoints" / "step_6", directory / "checkpoints" / "step_6")
    exported = [path / "checkpoints" / "hf_step_6" / "model.safetensors" for path in (uninterrupted, directory)]
    assert exported[0].read_bytes() == exported[1].read_bytes()


def test_a_checkpoint_is_whole_and_readable_without_the_run(uninterrupted: Path):
    checkpoints = uninterrupted / "checkpoints"
    assert json.loads((checkpoints / "latest").read_text()) == {"checkpoint": "step_6"}
    assert damaged_files(checkpoints / "step_6") == []
    assert "time/checkpoint_s" in json.loads(lines_of_so_far(uninterrupted)[3])
    assert torch.load(checkpoints / "step_6" / "random.pt", weights_only=True)[1]["torch"].dtype == torch.uint8


def test_a_flipped_byte_is_named_and_the_checkpoint_before_it_offered(uninterrupted: Path, program: Program):
    damaged = uninterrupted / "checkpoints" / "step_6" / "__0_1.distcp"
    whole = damaged.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    damaged.write_bytes(flipped)
    done = program.run("train", uninterrupted / "recipe.yaml", "--output-dir", uninterrupted, "--resume", num_ranks=2)
    damaged.write_bytes(whole)
    assert done.returncode == 2
    assert done.stderr.count("megatron-gspo:") == 1
    assert f"{damaged} is damaged" in done.stderr
    assert "--resume-from 3" in done.stderr


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    """The process ids of a launcher's ranks, by rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    environments = {int(child): Path(f"/proc/{child}/environ").read_bytes().split(b"\0") for child in children}
    return [
        next(child for child, environment in environments.items() if f"RANK={rank}".encode() in environment)
        for rank in range(len(children))
    ]


def test_a_signal_to_one_rank_stops_all_at_the_same_step_with_a_checkpoint(
    recipe: Path, program: Program, tmp_path: Path
):
    directory = tmp_path / "run"
    asked = program.start("train", recipe, "training.steps=1000", "--output-dir", directory, num_ranks=2)
    wait_for_step(directory, 1, asked.has_ended)
    asked.signal(signal.SIGUSR1, rank=1)
    stopped = asked.wait()
    assert stopped.returncode == 75, stopped.stderr
    last = lines_of(directory)[-1]["step"]
    assert (directory / "checkpoints" / f"step_{last}" / "manifest.json").is_file()
    assert f"Stopped as asked, after step {last}" in stopped.stdout
    assert f"train {directory}/recipe.yaml --output-dir {directory} --resume" in stopped.stdout


def test_a_signal_to_a_run_that_still_imports_stops_it_after_its_first_step(recipe: Path, tmp_path: Path):
    directory = tmp_path / "run"
    process = start("train", recipe, "training.steps=1000", "--output-dir", directory)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(children.read_text().split()) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 75, err
    assert lines_of(directory)[-1]["step"] == 1
    assert (directory / "checkpoints/step_1/manifest.json").is_file()


def test_a_second_signal_ends_the_run_at_once(recipe: Path, tmp_path: Path):
    directory = tmp_path / "run"
    process = start("train", recipe, "training.steps=1000", "--output-dir", directory)
    wait_for_step(directory, 1, lambda: process.poll() is not None)
    first, second = ranks_of(process)
    os.kill(second, signal.SIGSTOP)  # now the first waits for it for ever
    process.send_signal(signal.SIGTERM)
    time.sleep(SAME_REQUEST_S + 0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert not Path(f"/proc/{first}").exists()
    assert not Path(f"/proc/{second}").exists()


def test_a_killed_rank_ends_the_others_and_is_named_first(recipe: Path, tmp_path: Path):
    directory = tmp_path / "run"
    process = start("train", recipe, "training.steps=1000", "--output-dir", directory)
    wait_for_step(directory, 1, lambda: process.poll() is not None)
    first, second = ranks_of(process)
    os.kill(second, signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGKILL
    assert not Path(f"/proc/{first}").exists()
    after_the_start = err[err.index("megatron-gspo:") :]
    assert after_the_start.startswith("megatron-gspo: rank 1 was ended by SIGKILL")
    assert "Traceback" not in err[: err.index("megatron-gspo:")]
