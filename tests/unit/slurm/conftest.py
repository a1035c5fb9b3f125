"""A recipe of a tiny model, and what `submit` makes of it without a cluster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_gspo.cli import parse
from megatron_gspo.slurm.arguments import Submission, read_submit
from tests.tiny_model import tiny_recipe, write_tiny_model


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For layouts of 1, 2, 4 and 8 replicas."""
    directory = tmp_path_factory.mktemp("recipe")
    write_tiny_model(directory / "model")
    (directory / "tiny.yaml").write_text(tiny_recipe(directory / "model", training={"prompts_per_step": 16}))
    return directory / "tiny.yaml"


@pytest.fixture
def submission(recipe: Path, tmp_path: Path) -> Callable[..., Submission]:
    """What is asked for by `submit RECIPE` with more arguments."""

    def read(*arguments: object) -> Submission:
        words = ["submit", str(recipe), *map(str, arguments), "--output-dir", str(tmp_path / "runs")]
        return read_submit(parse(words))

    return read
