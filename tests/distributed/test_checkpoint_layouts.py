"""A checkpoint of one parallel layout, loaded in another: the same weights and moments, and the same update after it."""

from pathlib import Path

import pytest
import torch

from tests.distributed.rank_pool import RankPool
from tests.tiny_model import tiny_recipe, write_tiny_model

RANKS = "tests.distributed.checkpoint_on_ranks:"
LAYOUTS = {"tensor": 2}, {"expert": 2}, {"data": 2}, {"pipeline": 2}, {}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint_layouts")
    write_tiny_model(directory / "model")
    text = tiny_recipe(directory / "model", routing={"measure": False}, evaluation={"prompts": 1})
    (directory / "tiny.yaml").write_text(text)
    return directory / "tiny.yaml"


def overrides(layout: dict[str, int]) -> list[str]:
    return [f"parallel.{name}={size}" for name, size in layout.items()]


@pytest.mark.parametrize(
    ("saved_as", "loaded_as"),
    [
        ({"tensor": 2}, {"expert": 2}),
        ({"expert": 2}, {}),
        ({}, {"data": 2}),
        ({"data": 2}, {"pipeline": 2}),
        ({"pipeline": 2}, {"tensor": 2}),
    ],
    ids=lambda layout: "-".join(f"{name}{size}" for name, size in layout.items()) or "one",
)
def test_another_layout_goes_on_from_the_same_state(
    ranks: RankPool, recipe: Path, tmp_path: Path, saved_as: dict[str, int], loaded_as: dict[str, int]
):
    def on_ranks(function: str, layout: dict[str, int]) -> dict[str, torch.Tensor]:
        num_ranks = max([1, *layout.values()])
        arguments = {"recipe": str(recipe), "layout": overrides(layout), "directory": str(tmp_path)}
        return ranks.run(RANKS + function, num_ranks=num_ranks, **arguments)[0]

    saved = on_ranks("learn_save_learn", saved_as)
    loaded = on_ranks("load_save_learn", loaded_as)
    assert torch.equal(saved["weights"], loaded["weights"])
    for name, moment in saved["moments"].items():
        assert moment.abs().max() > 0, name
        assert torch.equal(moment, loaded["moments"][name]), name
    torch.testing.assert_close(loaded["weights_after"], saved["weights_after"], rtol=0, atol=2e-5)
    assert (saved["weights_after"] - saved["weights"]).abs().max() > 5e-4
