"""Checkpoints on real ranks: loaded in another parallel layout they are the same state, and a kill never tears one."""

from pathlib import Path

import pytest
import torch

from megatron_gspo.training.checkpoint_store import CheckpointStore, damaged_files
from tests.distributed.rank_pool import RankError, RankPool
from tests.tiny_model import tiny_recipe, write_tiny_model

RANKS = "tests.distributed.checkpoint_on_ranks:"


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


def test_a_save_killed_at_any_change_to_the_file_system_leaves_a_whole_checkpoint(
    ranks: RankPool, recipe: Path, tmp_path: Path
):
    newest = []
    for event in range(100):
        store = CheckpointStore(tmp_path / str(event))
        with pytest.raises(RankError) as raised:
            ranks.run(
                RANKS + "save_and_be_killed",
                num_ranks=1,
                recipe=str(recipe),
                directory=str(store.directory),
                at_event=event,
            )
        step = store.steps()[-1]
        assert damaged_files(store.path(step)) == [], event
        newest.append(step)
        if "survived" in str(raised.value):
            break
    # Killed early the older one is the newest, killed late the new one: and never none between the two.
    assert newest == sorted(newest)
    assert newest.count(1) > 8
    assert newest.count(2) > 2
