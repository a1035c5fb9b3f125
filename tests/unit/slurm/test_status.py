"""What is told of a run from its own files, where SLURM knows nothing of it any more."""

from pathlib import Path

import pytest

from megatron_gspo.slurm import scheduler
from megatron_gspo.slurm.status import find_submitted, print_status, read_attempts, run_status
from megatron_gspo.types import UserError

RECIPE = "model: {path: gone}\ndata: {train: arithmetic_chain}\ntraining: {steps: 30, prompts_per_step: 8}\n"


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", "")  # a machine without squeue
    run = tmp_path / "array" / "gspo_seed_1"
    (run / "slurm").mkdir(parents=True)
    (run / "slurm/job_id").write_text("12_0\n")
    (run / "slurm/recipe.yaml").write_text(RECIPE)
    return run


def test_a_run_that_has_not_started(submitted: Path):
    assert run_status(submitted).lines() == [
        f"{submitted}  job 12_0  unknown to SLURM  step 0/30  restarts 0",
        "    log: not started yet",
    ]


def test_a_run_that_gave_up(submitted: Path):
    notes = ["12_0 0 started 0 -", "12_0 0 stopped 4 75", "12_0 1 started 4 -", "12_0 1 gave_up 4 1"]
    (submitted / "slurm/attempts.txt").write_text(
        "".join(f"2026-01-01T00:00:00 {note}\n" for note in notes) + "2026-01-0"
    )
    (submitted / "metrics.jsonl").write_text('{"step": 4, "reward/mean": 0.5}\n{"step": 5, "reward/mean": 0.25}\n{"st')
    assert [attempt.checkpoint for attempt in read_attempts(submitted)] == [0, 4, 4, 4]
    assert run_status(submitted).lines() == [
        f"{submitted}  job 12_0  gave up  step 5/30  reward 0.250  restarts 1",
        f"    log: {submitted}/slurm/job_12_0_restart_1.log",
    ]


def test_a_comparisons_directory_stands_for_its_runs(submitted: Path):
    assert find_submitted(str(submitted)) == find_submitted(str(submitted.parent)) == [submitted]


def test_a_comparisons_directory_tells_of_the_job_that_draws_it_as_well(
    submitted: Path, capsys: pytest.CaptureFixture[str]
):
    comparison = submitted.parent

    def said() -> list[str]:
        print_status(str(comparison))
        return capsys.readouterr().out.splitlines()[2:]

    (comparison / "slurm").mkdir()
    (comparison / "slurm/compare_job_id").write_text("13\n")
    assert find_submitted(str(submitted)) == [submitted]
    assert said() == [
        f"{comparison}  comparison: job 13  unknown to SLURM  page: not drawn yet",
        "    log: not started yet",
    ]
    (comparison / "slurm/compare_13.log").touch()
    (comparison / "compare.html").touch()
    assert said() == [
        f"{comparison}  comparison: job 13  done  page: {comparison}/compare.html",
        f"    log: {comparison}/slurm/compare_13.log",
    ]


def test_what_is_neither_a_run_nor_a_job_is_refused(submitted: Path):
    assert scheduler.find_job("99") == []
    for target in ("99", str(submitted / "slurm")):
        with pytest.raises(UserError, match="neither a directory that a run was submitted to nor a job"):
            find_submitted(target)
