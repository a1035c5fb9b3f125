"""Two real SGLang servers for all tests here; most use the first. Where SGLang is not installed they fail, and say how to install it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_gspo.config import Recipe
from megatron_gspo.rollout.sglang import ServerHost
from tests.rollout.real_server import load, write_model_and_recipe


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_and_recipe(tmp_path_factory.mktemp("sglang"))


@pytest.fixture(scope="session")
def recipe(recipe_file: Path) -> Recipe:
    return load(recipe_file)


@pytest.fixture(scope="session")
def host(recipe: Recipe) -> Iterator[ServerHost]:
    started = ServerHost(recipe, on_cpu=True)
    yield started
    started.close()
