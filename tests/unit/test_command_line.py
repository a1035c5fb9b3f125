"""What is read from a command line, before anything is done about it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_gspo.cli import parse


@pytest.mark.parametrize(
    "words",
    [
        ["seed=2", "parallel.data=2", "--output-dir", "run"],
        ["seed=2", "--output-dir", "run", "parallel.data=2"],
        ["--output-dir", "run", "seed=2", "parallel.data=2"],
        ["--output-dir=run", "seed=2", "--resume", "parallel.data=2"],
    ],
)
def test_fields_of_a_recipe_may_stand_anywhere_behind_it(words: list[str]):
    parsed = parse(["train", "recipe.yaml", *words])
    assert parsed.overrides == ["seed=2", "parallel.data=2"]
    assert str(parsed.output_dir) == "run"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["train", "recipe.yaml", "--output-dir=run", "--nosuch", "seed=2"], "--nosuch"),
        (["train", "recipe.yaml", "--output-dir=run", "--nosuch=1"], "--nosuch=1"),
        (["train", "recipe.yaml", "--output-dir=run", "--resume", "seed 2"], "seed 2"),
        (["doctor", "seed=2"], "seed=2"),
    ],
)
def test_what_no_command_takes_is_refused_by_name(words: list[str], named: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as refused:
        parse(words)
    assert refused.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: unrecognized arguments: {named}\n")


def test_who_has_read_enough_sees_no_traceback():
    command = [sys.executable, "-m", "megatron_gspo", "doctor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as doctor:
        assert doctor.stdout is not None and doctor.stderr is not None
        doctor.stdout.close()
        assert doctor.stderr.read() == ""
    assert doctor.returncode == 1
