"""The study of the paper's claims, through the program: stopped, gone on with, answered."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
DEADLINE_S = 600.0


def start(output: Path, recipe: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.end_to_end.micro_study", str(recipe), "--jobs", "2", "--output", str(output)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_steps(output: Path, number: int, study: subprocess.Popen[str]) -> None:
    """Until some run has measured so many steps."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        assert study.poll() is None, study.communicate()[0]
        if any(len(file.read_text().splitlines()) > number for file in output.glob("runs/*/*/*/metrics.jsonl")):
            return
        time.sleep(0.02)
    raise AssertionError("no run has come so far")


def test_a_study_that_was_stopped_goes_on_runs_nothing_twice_and_answers(tmp_path: Path) -> None:
    recipe, output = tmp_path / "micro.yaml", tmp_path / "study"
    recipe.write_text(
        f"base: {REPOSITORY / 'recipes' / 'tiny_gspo.yaml'}\n"
        "warmstart: {steps: 3, warmup_steps: 1, sequences_per_step: 4}\n"
        "rollout: {responses_per_prompt: 2}\n"
        "evaluation: {prompts: 2, samples_per_prompt: 1}\n"
    )
    study = start(output, recipe)
    wait_for_steps(output, 2, study)
    study.send_signal(signal.SIGTERM)
    said = study.communicate(timeout=DEADLINE_S)[0]
    assert study.returncode == 75, said
    assert "the same command goes on" in said
    cold_start = output / "cold_starts" / "moe_2_1" / "finished.json"
    made = cold_start.stat().st_mtime_ns

    study = start(output, recipe)
    said = study.communicate(timeout=DEADLINE_S)[0]
    assert study.returncode == 0, said
    assert cold_start.stat().st_mtime_ns == made
    notes = [json.loads(file.read_text()) for file in output.glob("runs/*/*/*/finished.json")]
    assert [note["status"] for note in notes] == [0, 0]
    assert any(note["resumed"] for note in notes)
    mismatch = {}
    for file in output.glob("runs/*/*/*/metrics.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(13))
        mismatch[file.parts[-3].partition("_lr")[0]] = lines[-1]["mismatch/log_prob_abs_mean"]
    # Float32 engines agree to round-off; one that samples in bfloat16 (`rollout.dtype`) does not.
    assert mismatch["gspo"] < 1e-5
    assert mismatch["grpo_engine"] > 1e-4
    text = (output / "RESULTS.md").read_text()
    assert "All 2 runs have ended." in text
    assert "0 of 5 replicates" in text
    assert (output / "comparison_common.html").is_file()
    assert "[3/3]" in said
