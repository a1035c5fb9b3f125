"""The memory reckoned on paper is what real ranks allocate: parameters, gradients, optimizer states, to the byte.

The sizes are such that Megatron's buffers need padding everywhere: norms of 32 and 8 elements where parameters begin at
multiples of 64, and buffers that end at a multiple of 128.
"""

from pathlib import Path

import pytest

from megatron_gspo.config import load_recipe
from megatron_gspo.memory import ModelShapes
from megatron_gspo.memory.estimate import static_memory
from tests.distributed.rank_pool import RankPool
from tests.tiny_model import tiny_recipe, write_tiny_model

LAYOUTS = {
    "one rank": (1, []),
    "tensor 2": (2, ["parallel.tensor=2"]),
    "expert 2": (2, ["parallel.expert=2"]),
    "tensor 2, expert 2": (2, ["parallel.tensor=2", "parallel.expert=2", "parallel.expert_tensor=1"]),
    "expert tensor 2": (2, ["parallel.expert_tensor=2"]),
    "pipeline 2": (2, ["parallel.pipeline=2"]),
    "pipeline 2, virtual stages": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "context 2": (2, ["parallel.context=2"]),
    "data 2": (2, ["parallel.data=2"]),
    "tensor 2, pipeline 2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "expert 2, context 2, data 2": (4, ["parallel.expert=2", "parallel.context=2", "parallel.data=2"]),
}
OPTIMIZERS = {
    "sharded": ["parallel.distributed_optimizer=true"],
    "whole": ["parallel.distributed_optimizer=false"],
}
DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module", params=["untied", "tied"])
def recipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    directory: Path = tmp_path_factory.mktemp("memory")
    write_tiny_model(directory / "model", num_hidden_layers=4, tie_word_embeddings=request.param == "tied")
    (directory / "recipe.yaml").write_text(tiny_recipe(directory / "model"))
    return str(directory / "recipe.yaml")


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_what_is_reckoned_is_what_ranks_allocate(num_ranks: int, ranks: RankPool, recipe: str) -> None:
    variants = {
        f"{layout}, {optimizer} optimizer, {dtype}": [*sizes, *sharding, f"model.dtype={dtype}"]
        for layout, (wanted, sizes) in LAYOUTS.items()
        for optimizer, sharding in OPTIMIZERS.items()
        for dtype in DTYPES
        if wanted == num_ranks
    }
    function = "tests.distributed.memory_on_ranks:allocated_under"
    for rank in ranks.run(function, num_ranks=num_ranks, recipe=recipe, variants=variants):
        for variant, found in rank.items():
            reckoned = _reckoned(recipe, variants[variant], found)
            assert {part: found[part] for part in reckoned} == reckoned, variant


def _reckoned(recipe: str, overrides: list[str], place: dict[str, int]) -> dict[str, int]:
    loaded = load_recipe(Path(recipe), overrides)
    memory = static_memory(
        ModelShapes.read(loaded.model.path),
        loaded.parallel,
        2 if loaded.model.dtype == "bfloat16" else 4,
        place["stage"],
        (place["dense data rank"], place["expert data rank"]),
    )
    return {"parameters": memory.parameters, "gradients": memory.gradients, "optimizer": memory.optimizer}
