"""However the model is divided, its routes are recorded and replayed where they belong.

Every layout runs on real ranks: sequence parallelism cuts the tokens, pipelines the layers, data parallelism the
micro-batches. What all ranks record together is held against what one rank records of the whole model, not all of whose
layers have experts; recorded and replayed passes are held bit for bit against live ones by the ranks themselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.model_on_ranks import LENGTHS
from tests.distributed.rank_pool import RankPool
from tests.tiny_models import moe_config, reference_model

TASKS = "tests.distributed.routing_on_ranks"
CONFIGS = {
    "a dense layer": moe_config(mlp_only_layers=[1]),
    "a dense stage": moe_config(mlp_only_layers=[0, 1]),
}
LAYOUTS = {
    "tensor 2 with sequence parallelism": ({"tensor": 2}, "a dense layer"),
    "expert 2": ({"expert": 2}, "a dense layer"),
    "pipeline 2": ({"pipeline": 2}, "a dense layer"),
    "pipeline 2, one stage dense": ({"pipeline": 2}, "a dense stage"),
    "pipeline 2 with virtual stages": ({"pipeline": 2, "virtual_pipeline": 2}, "a dense layer"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = {}
    for name, config in CONFIGS.items():
        paths[name] = tmp_path_factory.mktemp("checkpoint")
        reference_model(config).save_pretrained(paths[name])
    return paths


@pytest.fixture(scope="module")
def whole_routes(ranks: RankPool, checkpoints: dict[str, Path]) -> dict[str, list[torch.Tensor]]:
    """One rank's routes of every micro-batch, for each model: [S, MoE layers, K]."""
    return {
        name: ranks.run(f"{TASKS}:routes_of_one_rank", num_ranks=1, checkpoint=str(path))[0]
        for name, path in checkpoints.items()
    }


def as_the_engine_returns_them(routes: torch.Tensor, lengths: tuple[int, ...]) -> list[Any]:
    """The routes of each sample, without its last token's and without padding's."""
    return [sample[:-1].tolist() for sample in routes[: sum(lengths)].split(lengths)]


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_routes_are_recorded_and_replayed_where_they_belong(
    layout: str,
    recompute: str,
    ranks: RankPool,
    checkpoints: dict[str, Path],
    whole_routes: dict[str, list[torch.Tensor]],
):
    sizes, model = LAYOUTS[layout]
    whole = whole_routes[model]
    results = ranks.run(
        f"{TASKS}:record_and_replay",
        num_ranks=2,
        checkpoint=str(checkpoints[model]),
        layout=sizes,
        recompute=recompute,
        engine_routes=[
            as_the_engine_returns_them(routes, lengths) for routes, lengths in zip(whole, LENGTHS, strict=True)
        ],
    )
    seen = [torch.zeros(routes.shape[:2], dtype=torch.int) for routes in whole]
    for rank in results:
        for offset, (routes, tokens) in enumerate(zip(rank["routes"], rank["token_positions"], strict=True)):
            number = rank["first_micro_batch"] + offset
            where = tokens[:, None], torch.tensor(rank["layer_indices"], dtype=torch.long)
            assert torch.equal(routes.sort(-1).values, whole[number][where].sort(-1).values)
            seen[number][where] += 1
    assert all((times == 1).all() for times in seen), "every token, layer and micro-batch is on one rank"

    num_calls = whole[0].shape[1] * (2 if recompute == "full" else 1)
    num_tokens, num_samples = sum(map(sum, LENGTHS)), sum(map(len, LENGTHS))
    counts = torch.tensor([[rank["replayed"], rank["replayed_from_engine"]] for rank in results]).sum(0)
    assert counts.tolist() == [
        [num_tokens * num_calls, 0],
        [(num_tokens - num_samples) * num_calls, num_samples * num_calls],
    ]
