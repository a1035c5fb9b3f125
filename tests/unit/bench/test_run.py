"""The bench's command line: what it refuses, what it reads before it measures, and what it writes where."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tools.bench import child, results, run
from tools.bench.harness import Bench

PAGE = "<!-- measured -->\n<!-- /measured -->\n<!-- how fast -->\n<!-- /how fast -->\n"


def measured(value: float) -> dict[str, Any]:
    figure = {"name": "speed", "values": [value], "better": "higher", "aim": 1.0}
    row = {"figures": [figure], "differences": {}, "swing": {}, "profile": [], "notes": []}
    return row | {"made": {"versions": {"python": "3.11"}}}


def git(root: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=A", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of one commit that takes this one's place, without peers; every row measures 2.0."""
    git(tmp_path, "init", "-q")
    (tmp_path / "page.md").write_text(PAGE)
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "RESULTS", tmp_path / "build/bench.json")
    monkeypatch.delenv(run.PEERS, raising=False)
    measuring(monkeypatch, lambda: None)
    return tmp_path


def measuring(monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], object], value: float = 2.0) -> None:
    """Let every row measure `value` while something else happens."""

    def measure(name: str, python: Path, rounds: int) -> dict[str, Any]:
        meanwhile()
        return measured(value)

    monkeypatch.setattr(run, "measure", measure)


def test_a_file_is_compared_with_before_it_is_written(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    file = str(root / "results.json")
    assert run.main(["packing", "--json", file]) == 0
    measuring(monkeypatch, lambda: None, value=3.0)
    assert run.main(["packing", "--json", file, "--compare", file]) == 0
    assert "better: packing: speed: 2 (2 – 2) → 3 (3 – 3)" in capsys.readouterr().out


def test_results_are_written_where_git_ignores_them_and_it_is_said(root: Path, capsys: pytest.CaptureFixture[str]):
    assert run.main(["packing"]) == 0
    assert results.read(root / "build/bench.json").keys() == {"packing"}
    assert f"Results are in {root / 'build/bench.json'}." in capsys.readouterr().out


def test_the_default_file_is_one_that_git_ignores():
    subprocess.run(["git", "check-ignore", "-q", run.RESULTS], cwd=run.ROOT, check=True)


def test_the_commit_and_its_changes_are_those_before_the_measurement(root: Path, monkeypatch: pytest.MonkeyPatch):
    first = git(root, "rev-parse", "--short", "HEAD")

    def another_commit() -> None:
        (root / "new.py").write_text("")
        git(root, "add", ".")
        git(root, "commit", "-qm", "second")
        (root / "new.py").write_text("changed")

    measuring(monkeypatch, another_commit)
    run.main(["packing"])
    made = results.read(root / "build/bench.json")["packing"]["made"]
    assert made["commit"] == first
    assert made.keys() == {"date", "commit", "machine", "versions"}


def test_what_this_program_writes_is_no_change_but_other_files_are(root: Path):
    file, page = root / "results.json", root / "page.md"
    arguments = ["--json", str(file), "--docs", str(page)]
    for _ in range(2):  # the second time both differ from the commit
        assert run.main(["packing", "start_up", *arguments]) == 0
    assert all(" and changes" not in row["made"]["commit"] for row in results.read(file).values())
    (root / "other.py").write_text("")
    run.main(["packing", *arguments])
    assert results.read(file)["packing"]["made"]["commit"].endswith(" and changes")


def test_documents_hold_all_of_the_file_without_measuring_anything(root: Path, monkeypatch: pytest.MonkeyPatch):
    file, page = root / "results.json", root / "page.md"
    made = {"made": {"date": "2026-01-02", "commit": "abc"}}
    results.write(file, {"start_up": measured(0.5) | made, "packing": measured(2.0) | made})
    monkeypatch.setattr(run, "measure", None)
    assert run.main(["--rounds", "0", "--json", str(file), "--docs", str(page), "--readme", str(page)]) == 0
    text = page.read_text()
    kept = results.read(file)
    in_order = {name: kept[name] for name in ("packing", "start_up")}  # that of the rows
    assert f"<!-- measured -->\n{results.document(in_order)}\n<!-- /measured -->\n" in text
    assert f"<!-- how fast -->\n{results.aims(in_order)}\n<!-- /how fast -->\n" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "nothing is not a row"),
        (["--rounds", "-1"], "--rounds is -1"),
        (["--compare", "none.json"], "none.json is no file"),
        (["--docs", "page.md"], "--docs shows what --json holds"),
        (["--readme", "page.md"], "--readme shows what --json holds"),
        (["--readme", "bare.md", "--json", "new.json"], "no file with the lines <!-- how fast -->"),
        (["--readme", "page.md", "--json", "new.json", "--rounds", "0"], "new.json is no file"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_anything_is_measured(
    root: Path, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(run, "measure", None)
    monkeypatch.chdir(root)
    (root / "bare.md").write_text("<!-- measured -->\n<!-- /measured -->\n")
    assert run.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_row_that_fails_leaves_the_others_and_nothing_is_said_to_have_moved(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    file = root / "before.json"
    results.write(file, {"packing": measured(2.0)})
    monkeypatch.setattr(run, "measure", lambda name, python, rounds: None)
    assert run.main(["packing", "--compare", str(file)]) == 1
    said = capsys.readouterr()
    assert "moved" not in said.out and "packing: failed" in said.err
    assert not (root / "build").exists()


def test_a_row_beside_peers_of_another_interpreter_records_what_that_has(root: Path, monkeypatch: pytest.MonkeyPatch):
    python = root / "python"
    python.write_text(f'#!/bin/sh\ncd {Path(__file__).parents[3]} && exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv(run.PEERS, str(python))
    run.main(["rl_step", "policy_loss", "packing"])
    made = {name: row["made"] for name, row in results.read(root / "build/bench.json").items()}
    assert made["rl_step"]["peers"] == results.versions()
    assert "peers" not in made["policy_loss"] | made["packing"]  # of which one runs in that interpreter alone


def test_a_row_names_the_versions_that_it_ran_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def measure(bench: Bench) -> None:
        bench.figure("speed", [1.0] * bench.rounds, better="lower", expected=1.0, margin=0.5)

    module = ModuleType("tools.bench.rows.fake")
    module.measure = measure  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tools.bench.rows.fake", module)
    child.main("fake", "2", str(tmp_path / "row.json"))
    row = json.loads((tmp_path / "row.json").read_text())
    assert row["made"] == {"versions": results.versions()} and "torch" in row["made"]["versions"]
    assert results.markdown({"fake": row}).endswith("| fake | speed | 1 | 1 – 1 | 2 | yes (1 ± 0.5) |")
