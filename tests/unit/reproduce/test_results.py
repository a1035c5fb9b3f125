"""From run directories to the files that hold the results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.run_directories import write_run
from tools.reproduce.__main__ import chosen, main
from tools.reproduce.document import write_results
from tools.reproduce.measure import chosen_rates, finished_file
from tools.reproduce.models import write_model
from tools.reproduce.plan import RunSpec, specs_of
from tools.reproduce.study import FULL, LEARNING_RATES, MODELS, QUICK, Experiment


def write_finished(output: Path, spec: RunSpec, reward: float, *, status: int = 0, steps: int = 20) -> None:
    """A run of the study as the schedule leaves it."""
    directory = output / "runs" / spec.name
    objective = "grpo" if spec.arm.startswith("grpo") else "gspo"
    cold_start = output / f"cold_{spec.cold_start}"
    write_model(MODELS[spec.model], cold_start)
    overrides = (f"objective.name={objective}", f"seed={spec.seed}", f"model.path={cold_start}")
    write_run(directory, *overrides, steps=steps, planned=20, kept_every=100, changes={"reward/mean": reward})
    note = {"arguments": [], "status": status, "cpu_s": 30.0, "wall_s": 30.0, "resumed": False}
    finished_file(directory).write_text(json.dumps(note))


def test_the_results_say_what_ran_and_answer_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = QUICK[0]
    for spec in specs_of(common, lambda arm: None):
        if spec.arm in ("gspo", "grpo") and spec.seed < 3:
            write_finished(tmp_path / "study", spec, 0.7 if spec.arm == "gspo" else 0.6)
    write_results(QUICK, tmp_path / "study", "bash tools/reproduce.sh --quick", tmp_path / "docs")
    text = (tmp_path / "docs" / "RESULTS.md").read_text()
    assert "**Unfinished: 4 of 33 runs have ended.**" in text
    assert "| 1b | GSPO is more efficient than GRPO at a common learning rate" in text
    assert "2 of 5 replicates" in text
    assert "bash tools/reproduce.sh --quick" in text
    assert str(tmp_path) not in text
    assert "differences.png" not in text  # nothing is answered yet
    for picture in ("learning_curves.png", "clip_fractions.png", "decomposition.png"):
        assert f"(results/{picture})" in text
        assert (tmp_path / "docs" / "results" / picture).read_bytes().startswith(b"\x89PNG")
    answers = json.loads((tmp_path / "study" / "results.json").read_text())
    assert answers["1b"]["verdict"] == "not answered yet"
    assert answers["1b"]["estimates"]["GSPO − GRPO"]["value"] == pytest.approx(0.1)
    assert (tmp_path / "study" / "comparison_common.html").is_file()
    assert "1b  GSPO is more efficient" in capsys.readouterr().out


def test_an_arms_best_rate_is_known_once_its_sweep_has_ended(tmp_path: Path) -> None:
    rewards = dict(zip(LEARNING_RATES, (0.5, 0.6, 0.9, 0.8, 0.2, 0.1), strict=True))
    sweep = next(experiment for experiment in FULL if experiment.name == "sweep")
    specs = [spec for spec in specs_of(sweep, lambda arm: None) if spec.arm == "grpo"]
    for spec in specs[:-1]:
        write_finished(tmp_path, spec, rewards[spec.rate])
    assert chosen_rates(FULL, tmp_path)("grpo") is None
    # The last one diverged after five steps of the highest reward: the steps it never took count as 0.
    write_finished(tmp_path, specs[-1], 1.0, status=1, steps=5)
    assert chosen_rates(FULL, tmp_path)("grpo") == LEARNING_RATES[2]
    assert chosen_rates(FULL, tmp_path)("gspo") is None


def test_only_what_the_claims_need_is_run() -> None:
    def names(only: str) -> list[str]:
        return [experiment.name for experiment in chosen(FULL, only)]

    assert names("6") == ["engine"]
    assert names("4, 2") == ["common", "depth", "clip", "sparse"]
    assert all(isinstance(experiment, Experiment) for experiment in chosen(QUICK, None))


@pytest.mark.parametrize("arguments", [["--only", "7"], ["--jobs", "0"]])
def test_a_wrong_argument_is_refused_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--plan"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"reproduce: {arguments[0]}")
    assert "accepted" in said
