"""A run beside which checkpoints are written: when it may change what is saved, and what it leaves when it fails."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from megatron_gspo.training import loop
from megatron_gspo.training.checkpoint_saver import CheckpointSaver, SaveFailedError
from megatron_gspo.training.checkpoint_writer import Writer
from megatron_gspo.training.loop import train
from tests.unit.training.test_step import make_recipe

pytestmark = pytest.mark.usefixtures("_one_rank", "_signals_as_they_were")


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> list[Writer]:
    """All that were started; each copies when the run waits for it, and no sooner."""
    started: list[Writer] = []
    is_waited_for = threading.Event()
    copy = Writer._on_host

    def held_back(writer: Writer) -> Any:
        assert is_waited_for.wait(timeout=60)
        return copy(writer)

    def start(writer: Writer) -> None:
        is_waited_for.clear()
        started.append(writer)
        threading.Thread.start(writer)

    def join(writer: Writer) -> None:
        is_waited_for.set()
        threading.Thread.join(writer)

    def wait_until_copied(saver: CheckpointSaver) -> None:
        is_waited_for.set()
        wait(saver)

    wait = CheckpointSaver.wait_until_copied
    monkeypatch.setattr(Writer, "_on_host", held_back)
    monkeypatch.setattr(Writer, "start", start)
    monkeypatch.setattr(Writer, "join", join)
    monkeypatch.setattr(CheckpointSaver, "wait_until_copied", wait_until_copied)
    monkeypatch.setattr(loop, "write_report", lambda _: None)  # most of such a small run's time
    return started


def test_nothing_is_learned_before_the_state_is_copied(
    writers: list[Writer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    learn, copied = loop.learn, []

    def observed(*arguments: Any) -> Any:
        copied.append([writer.copied.is_set() for writer in writers])
        return learn(*arguments)

    monkeypatch.setattr(loop, "learn", observed)
    assert train(make_recipe(tmp_path, training={"steps": 3, "save_every": 1}), tmp_path / "run")
    assert copied == [[], [True], [True, True]]


def test_a_run_that_fails_leaves_no_thread_behind(
    writers: list[Writer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> None:
        if writers:  # the save of the step that is recorded has begun
            raise ValueError("something else")

    monkeypatch.setattr(loop, "record", fail)
    with pytest.raises(ValueError, match="something else"):
        train(make_recipe(tmp_path, training={"steps": 3, "save_every": 1}), tmp_path / "run")
    assert [writer.is_alive() for writer in writers] == [False]


def test_what_stops_the_copy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(_: Writer) -> Any:
        raise MemoryError("no room for a copy")

    monkeypatch.setattr(Writer, "_on_host", fail)
    with pytest.raises(SaveFailedError, match="MemoryError: no room for a copy; there is none before it"):
        train(make_recipe(tmp_path, training={"steps": 1}), tmp_path / "run")
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
