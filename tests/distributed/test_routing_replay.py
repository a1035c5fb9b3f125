"""However the model is divided, its routes are recorded and replayed where they belong.

Every layout runs on real ranks: sequence parallelism cuts the tokens, pipelines the layers, data parallelism the
micro-batches. What all ranks record together is held against what one rank records of the whole model, one layer of
which is dense; recorded and replayed passes are held bit for bit against live ones by the ranks themselves.
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
NUM_MOE_LAYERS = 3
LAYOUTS = {
    "tensor 2 with sequence parallelism": {"tensor": 2},
    "expert 2": {"expert": 2},
    "pipeline 2": {"pipeline": 2},
    "pipeline 2 with virtual stages": {"pipeline": 2, "virtual_pipeline": 2},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    reference_model(moe_config(mlp_only_layers=[1])).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def whole_routes(ranks: RankPool, checkpoint: Path) -> list[torch.Tensor]:
    """One rank's routes of every micro-batch: [S, MoE layers, K]."""
    return ranks.run(f"{TASKS}:routes_of_one_rank", num_ranks=1, checkpoint=str(checkpoint))[0]


def as_the_engine_returns_them(routes: torch.Tensor, lengths: tuple[int, ...]) -> list[Any]:
    """The routes of each sample, without its last token's and without padding's."""
    return [sample[:-1].tolist() for sample in routes[: sum(lengths)].split(lengths)]


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_routes_are_recorded_and_replayed_where_they_belong(
    layout: str, recompute: str, ranks: RankPool, checkpoint: Path, whole_routes: list[torch.Tensor]
):
    results = ranks.run(
        f"{TASKS}:record_and_replay",
        num_ranks=2,
        checkpoint=str(checkpoint),
        layout=LAYOUTS[layout],
        recompute=recompute,
        engine_routes=[
            as_the_engine_returns_them(routes, lengths) for routes, lengths in zip(whole_routes, LENGTHS, strict=True)
        ],
    )
    seen = [torch.zeros(routes.shape[:2], dtype=torch.int) for routes in whole_routes]
    for rank in results:
        for offset, (routes, tokens) in enumerate(zip(rank["routes"], rank["token_ranges"], strict=True)):
            number = rank["first_micro_batch"] + offset
            where = torch.tensor(tokens)[:, None], torch.tensor(rank["layer_indices"])
            assert torch.equal(routes.sort(-1).values, whole_routes[number][where].sort(-1).values)
            seen[number][where] += 1
    assert all((times == 1).all() for times in seen), "every token, layer and micro-batch is on one rank"

    num_calls = NUM_MOE_LAYERS * (2 if recompute == "full" else 1)
    num_tokens, num_samples = sum(map(sum, LENGTHS)), sum(map(len, LENGTHS))
    counts = torch.tensor([[rank["replayed"], rank["replayed_from_engine"]] for rank in results]).sum(0)
    assert counts.tolist() == [
        [num_tokens * num_calls, 0],
        [(num_tokens - num_samples) * num_calls, num_samples * num_calls],
    ]
