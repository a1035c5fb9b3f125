"""A rollout engine that goes away, anywhere in a run: saved where the last step ended, and nothing differs afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_gspo.config import Recipe
from megatron_gspo.rollout.engine import EngineGoneError
from megatron_gspo.rollout.local import LocalEngine
from megatron_gspo.training import loop
from megatron_gspo.training.loop import train
from tests.unit.training.test_step import make_recipe

pytestmark = pytest.mark.usefixtures("_one_rank", "_signals_as_they_were")

UNTIMED = ("time/", "throughput/", "memory/")


@pytest.fixture
def outage_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """The engine is gone from its n-th call on; 0 for never. It is the real one until then."""
    generate_until = LocalEngine.generate_until

    def begin(call: int) -> None:
        calls = iter(range(1, 1000))

        def until_it_is_gone(engine: LocalEngine, *arguments: Any) -> Any:
            if 0 < call <= next(calls):
                raise EngineGoneError("no server has answered")
            return generate_until(engine, *arguments)

        monkeypatch.setattr(LocalEngine, "generate_until", until_it_is_gone)
        monkeypatch.setattr(loop, "write_report", lambda _: None)  # most of such a small run's time

    return begin


def lines_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(UNTIMED)} for line in lines]


def state_of(run: Path, step: int) -> dict[str, Any]:
    return json.loads((run / "checkpoints" / f"step_{step}" / "state.json").read_text())


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return make_recipe(
        tmp_path,
        training={"steps": 2},
        routing={"measure": False},
        evaluation={"every": 1, "prompts": 2, "samples_per_prompt": 2},
        environment={
            "name": "tests.unit.rollout.talkative:Talkative",
            "max_turns": 2,
            "max_observation_tokens": 8,
        },
    )


def test_a_run_that_lost_its_engine_is_the_run_that_never_did(
    recipe: Recipe, outage_at: Callable[[int], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    outage_at(0)
    assert train(recipe, tmp_path / "uninterrupted")
    assert lines_of(tmp_path / "uninterrupted")[1]["grad_norm"] > 0, "there is something to learn"
    # Two calls each, one a turn: evaluation 0, step 1, evaluation 1, step 2, evaluation 2.
    for call, step, owes_evaluation in ((2, 0, True), (8, 1, False), (10, 2, True)):
        run = tmp_path / f"outage_{call}"
        outage_at(call)
        capsys.readouterr()
        assert not train(recipe, run)
        assert f"after step {step}, with a checkpoint of it: no server has answered" in capsys.readouterr().out
        assert len(lines_of(run)) == step + (not owes_evaluation)
        saved = state_of(run, step)
        assert saved["prompts"]["cursor"] == step * recipe.training.prompts_per_step
        assert saved["prompts"]["unfinished"] == [], (
            "the prompts of the step that was taken back are behind the cursor no more"
        )
        assert saved["owes_evaluation"] == owes_evaluation
        outage_at(0)
        assert train(recipe, run, resume=True)
        assert lines_of(run) == lines_of(tmp_path / "uninterrupted")
        policies = [path / "checkpoints/hf_step_2/model.safetensors" for path in (run, tmp_path / "uninterrupted")]
        assert policies[0].read_bytes() == policies[1].read_bytes()


def test_an_outage_right_after_going_on_leaves_the_checkpoint_that_is_there(
    recipe: Recipe, outage_at: Callable[[int], None], tmp_path: Path
):
    outage_at(1)
    assert not train(recipe, tmp_path / "run")
    before = state_of(tmp_path / "run", 0)
    assert not train(recipe, tmp_path / "run", resume=True)
    assert state_of(tmp_path / "run", 0) == before
