"""The page of curves: drawn from a run directory alone, in one file."""

import json

import pytest

from megatron_gspo.report.curves import summary, write_report
from megatron_gspo.types import UserError


def write_run(path, lines):
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


LINES = [
    {"step": 0, "policy_version": 0, "eval/arithmetic_chain/pass_at_1": 0.4},
    {"step": 1, "policy_version": 1, "reward/mean": 0.41, "clip/token_fraction": 0.2, "entropy/mean": None},
    {"step": 2, "policy_version": 2, "reward/mean": 0.62, "eval/arithmetic_chain/pass_at_1": 0.7},
]


def test_the_page_is_one_file_that_fetches_nothing(tmp_path):
    page = write_report(write_run(tmp_path / "run", LINES)).read_text()
    assert "<script src" not in page
    assert "<link" not in page
    assert "held-out problems" in page


def test_the_summary_compares_the_last_evaluation_with_the_first(tmp_path):
    assert summary(LINES) == "eval/arithmetic_chain/pass_at_1: 0.400 at step 0, 0.700 at step 2"
    assert summary(LINES[1:2]) == "reward/mean: 0.410 at first, 0.410 at the end"


def test_a_directory_without_metrics_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="still empty"):
        write_report(write_run(tmp_path / "run", []))


def test_a_run_name_cannot_inject_markup(tmp_path):
    page = write_report(write_run(tmp_path / "<img src=x>", LINES)).read_text()
    assert "<img src=x>" not in page
