"""A run directory as it may be found: finished, running, stopped, crashed, half written, or no run at all."""

import os

import pytest

from megatron_gspo.report.metrics import RunDirectory
from megatron_gspo.report.read import read_run
from megatron_gspo.types import UserError
from tests.run_directories import write_run

NOW = 2e9


def aged(path, seconds):
    for file in path.iterdir():
        os.utime(file, (NOW - seconds, NOW - seconds))
    return path


def close_run(path, failure=None):
    """Let `train`'s own code open and close the log of the run in `path`, as an exception passes or not."""
    recipe = (path / "recipe.yaml").read_text()
    directory = RunDirectory.go_on(path, recipe, {}, {"step": 30}, tensorboard=False)
    try:
        if failure is not None:
            raise failure
    finally:
        directory.close()


def test_a_run_with_all_its_steps_is_finished(tmp_path):
    run = read_run(aged(write_run(tmp_path / "run"), 1e6), now=NOW)
    assert (run.state.kind, run.last_step, run.half_written) == ("finished", 30, False)
    assert run.series("eval/arithmetic_chain/pass_at_1").steps.tolist() == [0, 10, 20, 30]


@pytest.mark.parametrize(("silent_s", "kind"), [(20.0, "running"), (299.0, "running"), (301.0, "silent")])
def test_a_run_without_a_last_word_is_judged_by_its_silence(silent_s, kind, tmp_path):
    run = read_run(aged(write_run(tmp_path / "run", planned=100), silent_s), now=NOW)
    assert run.state.kind == kind
    assert "sign of life" in run.state.evidence


def test_slow_steps_may_be_silent_for_long(tmp_path):
    path = write_run(tmp_path / "run", planned=100, changes={"time/step_s": 600.0})
    assert read_run(aged(path, 5000.0), now=NOW).state.kind == "running"
    assert read_run(aged(path, 6100.0), now=NOW).state.kind == "silent"


def test_an_exception_and_an_orderly_end_leave_word_in_the_log(tmp_path):
    path = write_run(tmp_path / "run", planned=100)
    close_run(path)
    assert read_run(path).state.kind == "stopped"
    with pytest.raises(RuntimeError):
        close_run(path, RuntimeError("the loss was not finite\nthree times"))
    state = read_run(path).state
    assert state.kind == "failed"
    assert "RuntimeError: the loss was not finite" in state.evidence


def test_a_half_written_last_line_is_left_out_and_said(tmp_path):
    path = write_run(tmp_path / "run", planned=100)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "rew')
    run = read_run(path)
    assert (run.last_step, run.half_written) == (30, True)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / "metrics.jsonl").unlink(), r"run holds no metrics\.jsonl; accepted"),
        (lambda path: (path / "metrics.jsonl").write_text(""), r"metrics\.jsonl is still empty"),
        (lambda path: (path / "metrics.jsonl").write_text("{}\n"), r"metrics\.jsonl:1 is no step's metrics"),
        (lambda path: (path / "recipe.yaml").unlink(), r"recipe\.yaml cannot be read"),
        (lambda path: (path / "recipe.yaml").write_text("a: [\n"), r"recipe\.yaml is broken"),
        (lambda path: (path / "recipe.yaml").write_text("seed: 1\n"), r"training\.steps is missing"),
        (lambda path: (path / "environment.json").write_text("{"), r"environment\.json is broken"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(spoil, message, tmp_path):
    path = write_run(tmp_path / "run")
    spoil(path)
    with pytest.raises(UserError, match=message) as refusal:
        read_run(path)
    assert "\n" not in str(refusal.value)
