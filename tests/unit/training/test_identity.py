"""What must be the same for a run to go on, and what need not."""

from pathlib import Path

import pytest

from megatron_gspo.config import load_recipe
from megatron_gspo.training.identity import model_identity, require_same_model, require_same_run
from megatron_gspo.training.rollouts import load_tokenizer
from megatron_gspo.types import UserError
from tests.tiny_model import tiny_recipe, write_tiny_model

CHECKPOINT = Path("runs/a/checkpoints/step_3")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_tiny_model(tmp_path / "model")
    (tmp_path / "tiny.yaml").write_text(tiny_recipe(tmp_path / "model"))
    return tmp_path / "tiny.yaml"


@pytest.mark.parametrize(
    "change",
    [
        "parallel.expert=2",
        "training.steps=9",
        "evaluation.every=1",
        "training.save_every=1",
        "data.eval=null",
        "training.background_save=false",
        "parallel.overlap_gradient_reduce=true",
    ],
)
def test_layout_and_what_only_watches_may_differ(recipe: Path, change: str):
    saved = load_recipe(recipe).model_dump(mode="json")
    require_same_run(CHECKPOINT, saved, load_recipe(recipe, [change]))


@pytest.mark.parametrize(
    "change",
    [
        "seed=2",
        "training.learning_rate=0.5",
        "objective.name=grpo",
        "rollout.temperature=0.5",
        "parallel.distributed_optimizer=false",
    ],
)
def test_what_the_run_learns_from_may_not(recipe: Path, change: str):
    saved = load_recipe(recipe).model_dump(mode="json")
    with pytest.raises(UserError, match=f"{change.partition('=')[0]} is .*; accepted: "):
        require_same_run(CHECKPOINT, saved, load_recipe(recipe, [change]))


def test_steps_may_not_differ_where_the_learning_rate_decays_over_them(recipe: Path):
    decaying = "training.learning_rate_schedule=cosine"
    saved = load_recipe(recipe, [decaying]).model_dump(mode="json")
    with pytest.raises(UserError, match=r"training\.steps is 9"):
        require_same_run(CHECKPOINT, saved, load_recipe(recipe, [decaying, "training.steps=9"]))


def test_another_model_is_refused_by_the_name_of_what_differs(recipe: Path, tmp_path: Path):
    model = tmp_path / "model"
    other = write_tiny_model(tmp_path / "other", vocab_size=288)
    saved = model_identity(model, load_tokenizer(model))
    require_same_model(CHECKPOINT, saved, saved, model)
    with pytest.raises(UserError, match=r"another model: its vocab_size is 272, that of .*other is 288"):
        require_same_model(CHECKPOINT, saved, model_identity(other, load_tokenizer(other)), other)


def test_another_vocabulary_is_refused(recipe: Path, tmp_path: Path):
    model = tmp_path / "model"
    tokenizer = load_tokenizer(model)
    saved = model_identity(model, tokenizer)
    tokenizer.add_tokens(["<another>"])
    with pytest.raises(UserError, match="another vocabulary"):
        require_same_model(CHECKPOINT, saved, model_identity(model, tokenizer), model)
