"""The run directory: whole lines, no NaN, and no run written over another."""

import json
import math

import pytest

from megatron_gspo.report.metrics import RunDirectory, read_metrics_file, refuse_used_directory
from megatron_gspo.types import UserError


def test_every_write_leaves_whole_lines_on_disk(tmp_path):
    directory = RunDirectory.create(tmp_path / "run", "seed: 1\n", {"python": "3"}, tensorboard=False)
    directory.write({"step": 1, "policy_version": 1, "reward/mean": 0.5})
    directory.write({"step": 2, "policy_version": 2, "reward/mean": 0.75})
    # Read before closing: a crash now must lose nothing.
    assert [line["reward/mean"] for line in read_metrics_file(tmp_path / "run" / "metrics.jsonl")[0]] == [0.5, 0.75]
    directory.close()
    assert (tmp_path / "run" / "recipe.yaml").read_text() == "seed: 1\n"
    assert json.loads((tmp_path / "run" / "environment.json").read_text()) == {"python": "3"}


def test_a_value_that_is_not_finite_becomes_null(tmp_path):
    directory = RunDirectory.create(tmp_path, "", {}, tensorboard=False)
    directory.write({"step": 1, "loss/policy": math.nan, "grad_norm": math.inf})
    directory.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert read_metrics_file(tmp_path / "metrics.jsonl") == (
        [{"step": 1, "loss/policy": None, "grad_norm": None}],
        False,
    )


def test_tensorboard_gets_the_same_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = RunDirectory.create(tmp_path, "", {})
    directory.write({"step": 3, "policy_version": 3, "reward/mean": 0.25})
    directory.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Scalars("reward/mean")
    assert (event.step, event.value) == (3, 0.25)


def test_a_directory_that_holds_a_run_is_refused(tmp_path):
    directory = RunDirectory.create(tmp_path / "run", "", {}, tensorboard=False)
    refuse_used_directory(tmp_path / "run")  # nothing has come of it yet
    directory.write({"step": 1})
    directory.close()
    with pytest.raises(UserError, match="holds a run already"):
        refuse_used_directory(tmp_path / "run")


def test_a_file_where_the_directory_should_be_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=r"run cannot be written \(File exists\)"):
        refuse_used_directory(tmp_path / "run")
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\)"):
        refuse_used_directory(tmp_path / "run" / "below")


def test_a_half_written_last_line_is_left_out_and_a_broken_one_before_it_named(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "rew')
    lines, half_written = read_metrics_file(file)
    assert ([line["step"] for line in lines], half_written) == ([1, 2], True)
    file.write_text('{"step": 1}\n{"step": 2, \n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2 is not JSON"):
        read_metrics_file(file)
    file.write_text('{"a": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:1 is no step's metrics"):
        read_metrics_file(file)
