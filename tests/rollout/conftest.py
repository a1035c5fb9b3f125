"""Real SGLang servers for all tests here, started once and at the same time: two in float32, and one in bfloat16 where a test
to be run asks for it. Most tests use the first. Where SGLang is not installed they fail, and say how to install it."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_gspo.config import Recipe
from megatron_gspo.rollout import sglang_server
from megatron_gspo.rollout.sglang import ServerHost
from megatron_gspo.rollout.sglang_server import write_key
from tests.rollout.real_server import load, with_sglang, write_model_and_recipe

#: How often servers are asked for a sign of life here: a test that has one hang need not wait long until it is missed.
LOOK_EVERY_S = 1.0


def write_key_like_an_option(directory: Path) -> Path:
    """One random key in 64 begins like this."""
    file = write_key(directory)
    file.write_text(f"-{file.read_text()}")
    return file


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_and_recipe(tmp_path_factory.mktemp("sglang"))


@pytest.fixture(scope="session")
def recipe(recipe_file: Path) -> Recipe:
    return load(recipe_file)


@pytest.fixture(scope="session")
def _hosts(request: pytest.FixtureRequest, recipe: Recipe) -> Iterator[dict[str, Future[ServerHost]]]:
    """Each on its way up."""
    wanted = {"host": recipe}
    if any("bfloat16_host" in item.fixturenames for item in request.session.items if isinstance(item, pytest.Function)):
        wanted["bfloat16_host"] = with_sglang(recipe, dtype="bfloat16", num_servers=1)
    sglang_server.LOOK_EVERY_S = LOOK_EVERY_S
    sglang_server.write_key = write_key_like_an_option
    with ThreadPoolExecutor() as threads:
        started = {name: threads.submit(ServerHost, asked, on_cpu=True) for name, asked in wanted.items()}
        yield started
    for host in started.values():
        if host.exception() is None:
            host.result().close()


@pytest.fixture(scope="session")
def host(_hosts: dict[str, Future[ServerHost]]) -> ServerHost:
    return _hosts["host"].result()


@pytest.fixture(scope="session")
def bfloat16_host(_hosts: dict[str, Future[ServerHost]]) -> ServerHost:
    return _hosts["bfloat16_host"].result()
