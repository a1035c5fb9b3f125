"""However the model is divided, it is the same model: log-probs, gradients, updates and exported weights.

Each layout runs on real ranks and is held against one rank. Gradients go through Megatron's data-parallel wrapper and
its reductions, updates through its optimizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed.rank_pool import RankPool
from tests.tiny_models import dense_config, moe_config, reference_model

TASKS = "tests.distributed.model_on_ranks"
CONFIGS = {
    "moe": moe_config(mlp_only_layers=[1]),
    "moe, tied": moe_config(tie_word_embeddings=True),
    "dense": dense_config(),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = {}
    for name, config in CONFIGS.items():
        paths[name] = tmp_path_factory.mktemp("checkpoint")
        reference_model(config).save_pretrained(paths[name], max_shard_size="60KB")
    return paths


@pytest.fixture(scope="module")
def on_one_rank(ranks: RankPool, checkpoints: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """What one rank computes, for each model."""
    return {
        name: ranks.run(
            f"{TASKS}:one_update",
            num_ranks=1,
            checkpoint=str(path),
            layout={"distributed_optimizer": False},
            model={},
        )[0]
        for name, path in checkpoints.items()
    }


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def log_probs_of_all(results: list[dict[str, Any]]) -> list[Tensor]:
    """Log-probs of all micro-batches in order: ranks that hold other data follow each other, others repeat."""
    gathered: list[Tensor] = []
    for result in results:
        found = result["log_probs"]
        is_repeated = gathered and found and torch.equal(found[0], gathered[0])
        gathered += [] if is_repeated else found
    return gathered


@pytest.mark.parametrize("distributed_optimizer", [False, True], ids=["whole optimizer", "distributed optimizer"])
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param("moe", {}, id="data 2"),
        pytest.param("moe", {"expert": 2}, id="expert 2"),
        pytest.param("moe", {"tensor": 2}, id="tensor 2"),
        pytest.param("moe", {"tensor": 2, "expert_tensor": 1}, id="tensor 2, experts whole"),
        pytest.param("moe", {"tensor": 2, "expert": 2, "expert_tensor": 1}, id="tensor 2, expert 2"),
        pytest.param("moe", {"pipeline": 2}, id="pipeline 2"),
        pytest.param("moe", {"pipeline": 2, "virtual_pipeline": 2}, id="pipeline 2, two chunks each"),
        pytest.param("moe, tied", {"tensor": 2}, id="tied, tensor 2"),
        pytest.param("moe, tied", {"pipeline": 2}, id="tied, pipeline 2"),
        pytest.param("dense", {"tensor": 2}, id="dense, tensor 2"),
        pytest.param("moe", {"context": 2}, id="context 2"),
        pytest.param("moe", {"context": 2, "expert": 2}, id="context 2, expert 2"),
        pytest.param("dense", {"context": 2}, id="dense, context 2"),
        pytest.param("moe", {"expert_tensor": 2}, id="expert tensor 2"),
    ],
)
def test_two_ranks_compute_what_one_computes(
    name: str,
    layout: dict[str, int],
    distributed_optimizer: bool,
    ranks: RankPool,
    checkpoints: dict[str, Path],
    on_one_rank: dict[str, dict[str, Any]],
):
    expected = on_one_rank[name]
    results = ranks.run(
        f"{TASKS}:one_update",
        num_ranks=2,
        checkpoint=str(checkpoints[name]),
        layout=layout | {"distributed_optimizer": distributed_optimizer},
        model={},
    )
    for found, single in zip(log_probs_of_all(results), expected["log_probs"], strict=True):
        torch.testing.assert_close(found, single, rtol=0, atol=1e-5)
    for result in results:
        assert all(torch.equal(result["loaded"][key], weight) for key, weight in expected["loaded"].items())
        assert result["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-5)
        if not distributed_optimizer:
            assert_close(result["gradients"], expected["gradients"], 1e-4)
        assert_close(result["updated"], expected["updated"], 1e-5)


def test_loaded_weights_are_exported_bit_by_bit(checkpoints: dict[str, Path], on_one_rank: dict[str, dict[str, Any]]):
    for name, path in checkpoints.items():
        stored = {key: tensor for file in path.glob("*.safetensors") for key, tensor in load_file(file).items()}
        loaded = on_one_rank[name]["loaded"]
        assert loaded.keys() == stored.keys()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in stored.items())


def test_recomputation_and_parallelism_go_together(
    ranks: RankPool, checkpoints: dict[str, Path], on_one_rank: dict[str, dict[str, Any]]
):
    (result, _) = ranks.run(
        f"{TASKS}:one_update",
        num_ranks=2,
        checkpoint=str(checkpoints["moe"]),
        layout={"tensor": 2, "expert": 2, "expert_tensor": 1, "distributed_optimizer": False},
        model={"recompute": "selective"},
    )
    assert_close(result["gradients"], on_one_rank["moe"]["gradients"], 1e-4)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param("moe", {"tensor": 2, "expert": 2, "expert_tensor": 1, "pipeline": 2}, id="all at once"),
        pytest.param("moe, tied", {"tensor": 2, "context": 2}, id="tied, tensor 2, context 2"),
        pytest.param("dense", {"context": 4}, id="dense, context 4"),
        pytest.param("dense", {"tensor": 4}, id="fewer key-value heads than ranks"),
    ],
)
def test_four_ranks_compute_what_one_computes(
    name: str,
    layout: dict[str, int],
    ranks: RankPool,
    checkpoints: dict[str, Path],
    on_one_rank: dict[str, dict[str, Any]],
):
    results = ranks.run(
        f"{TASKS}:one_update",
        num_ranks=4,
        checkpoint=str(checkpoints[name]),
        layout=layout | {"distributed_optimizer": False},
        model={},
    )
    expected = on_one_rank[name]
    for result in results:
        assert all(torch.equal(result["loaded"][key], weight) for key, weight in expected["loaded"].items())
        assert_close(result["gradients"], expected["gradients"], 1e-4)
        assert_close(result["updated"], expected["updated"], 1e-5)


def test_random_weights_are_the_same_in_every_layout_and_saved_whole(
    ranks: RankPool, checkpoints: dict[str, Path], tmp_path: Path
):
    whole = ranks.run(
        f"{TASKS}:random_weights",
        num_ranks=1,
        checkpoint=str(checkpoints["moe"]),
        layout={},
        output=str(tmp_path / "one"),
    )[0]
    divided = ranks.run(
        f"{TASKS}:random_weights",
        num_ranks=2,
        checkpoint=str(checkpoints["moe"]),
        layout={"tensor": 2, "expert": 2, "expert_tensor": 1},
        output=str(tmp_path / "two"),
    )
    saved = {
        key: tensor for file in (tmp_path / "two").glob("*.safetensors") for key, tensor in load_file(file).items()
    }
    for weights in (*divided, saved):
        assert weights.keys() == whole.keys()
        assert all(torch.equal(weights[key], tensor) for key, tensor in whole.items())
