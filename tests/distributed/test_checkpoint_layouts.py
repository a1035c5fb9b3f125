"""Checkpoints on real ranks: the same state in another layout, written beside the run, and never torn."""

import re
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megatron_gspo.training.checkpoint_store import CheckpointStore, damaged_files
from tests.distributed.rank_pool import RankError, RankPool
from tests.tiny_model import tiny_recipe, write_tiny_model

RANKS = "tests.distributed.checkpoint_on_ranks:"
WHOLE = ["parallel.distributed_optimizer=false"]
BFLOAT16 = ["model.dtype=bfloat16"]
LAYOUTS = {
    "one": [],
    "tensor 2": ["parallel.tensor=2"],
    "expert 2": ["parallel.expert=2"],
    "expert tensor 2": ["parallel.expert_tensor=2"],
    "data 2": ["parallel.data=2"],
    "context 2": ["parallel.context=2"],
    "pipeline 2": ["parallel.pipeline=2"],
    "virtual stages": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "data 2, whole": ["parallel.data=2", *WHOLE],
    "expert 2, whole": ["parallel.expert=2", *WHOLE],
    "tensor 2, bfloat16": ["parallel.tensor=2", *BFLOAT16],
    "expert 2, bfloat16": ["parallel.expert=2", *BFLOAT16],
}
# Each layout is saved in, and gone on in by the next one, the first by the last; what has experts on several ranks meets what
# has not, both ways.
CYCLES = (
    (
        *("tensor 2", "expert 2", "one", "data 2"),
        *("virtual stages", "expert tensor 2", "context 2", "pipeline 2"),
    ),
    ("data 2, whole", "expert 2, whole"),
    ("tensor 2, bfloat16", "expert 2, bfloat16"),
)
GOES_ON_IN = {first: second for cycle in CYCLES for first, second in pairwise((*cycle, cycle[0]))}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("checkpoint_layouts")
    write_tiny_model(directory / "model", num_hidden_layers=4)
    text = tiny_recipe(directory / "model", routing={"measure": False}, evaluation={"prompts": 1})
    (directory / "tiny.yaml").write_text(text)
    return str(directory / "tiny.yaml")


@pytest.fixture(scope="module")
def saved_and_loaded(
    ranks: RankPool, recipe: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, dict], dict[str, dict]]:
    """What every layout saved, and what the next one came to from it; by the name of the one that saved."""
    directory = tmp_path_factory.mktemp("layouts")
    saved, gone_on = {}, {}
    for cycle in CYCLES:
        before = None
        for layout in (*cycle, cycle[0]):
            states = ranks.run(
                RANKS + "save_and_go_on",
                num_ranks=1 if layout == "one" else 2,
                recipe=recipe,
                options=LAYOUTS[layout],
                own=None if layout in saved else str(directory / layout),
                saved=None if before is None else str(directory / before),
            )[0]
            if "own" in states:
                saved[layout] = states["own"]
            if before is not None:
                gone_on[before] = states["gone on"]
            before = layout
    return saved, gone_on


@pytest.mark.parametrize(("saved_as", "loaded_as"), GOES_ON_IN.items())
def test_another_layout_goes_on_from_the_same_state(
    saved_and_loaded: tuple[dict[str, dict], dict[str, dict]], saved_as: str, loaded_as: str
):
    saved, loaded = (states[saved_as] for states in saved_and_loaded)
    assert torch.equal(saved["weights"], loaded["weights"])
    assert sum(".exp_avg" in name for name in saved["moments"]) > 20
    assert saved["moments"].keys() == loaded["moments"].keys()
    for name, moment in saved["moments"].items():
        assert moment.abs().max() > 0, name
        assert torch.equal(moment, loaded["moments"][name]), name
    moved = (saved["weights_after"] - saved["weights"]).abs()
    assert moved.max() > 5e-4
    if "bfloat16" in loaded_as:
        # 8 bits: Adam makes steps of what is left where a sum is rounded differently. A sixth of the way is measured.
        apart = (loaded["weights_after"] - saved["weights_after"]).abs()
        assert apart.mean() < 0.3 * moved.mean()
    else:
        torch.testing.assert_close(loaded["weights_after"], saved["weights_after"], rtol=0, atol=2e-5)


def test_what_is_written_beside_the_run_is_the_state_it_was_saved_in(ranks: RankPool, recipe: str, tmp_path: Path):
    arguments = {"recipe": recipe, "options": ["parallel.expert=2"], "directory": str(tmp_path)}
    for found in ranks.run(RANKS + "save_beside_the_run", num_ranks=2, **arguments):
        assert found["moved"] > 5e-4
        assert found["while held"] == []
        assert found["at next save"] == [1]
    waited, beside = (CheckpointStore(tmp_path / name) for name in ("waited", "beside"))
    assert waited.steps() == [1]
    assert beside.steps() == [1, 2]
    assert damaged_files(beside.path(1)) == damaged_files(beside.path(2)) == []
    names = {path.name for path in waited.path(1).iterdir()}
    assert names == {path.name for path in beside.path(1).iterdir()}
    assert len([name for name in names if name.endswith(".distcp")]) >= 2
    # Megatron's index tells the time.
    for name in names - {".metadata", "manifest.json"}:
        assert (waited.path(1) / name).read_bytes() == (beside.path(1) / name).read_bytes(), name


def test_what_one_rank_could_not_write_all_ranks_hear_of(ranks: RankPool, recipe: str, tmp_path: Path):
    arguments = {"recipe": recipe, "options": ["parallel.expert=2"], "directory": str(tmp_path)}
    first, second = ranks.run(RANKS + "fail_to_save", num_ranks=2, **arguments)
    assert first.keys() == second.keys()
    for words in (first.pop("memory"), second.pop("memory")):
        assert "MemoryError: no room for a copy; the one of step 1 is untouched. Go on with --resume" in words
    for file, words in first.items():
        assert f"step 2: the checkpoint could not be written to {tmp_path}" in words, file
        assert "File too large" in words or (file == "common.pt" and "a file could not be written in full" in words)
        assert "the one of step 1 is untouched" in words, file
        assert "could not be written" in second[file], file
    store = CheckpointStore(tmp_path)
    assert store.steps() == [1, 3]
    assert damaged_files(store.path(1)) == damaged_files(store.path(3)) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB of its own."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", directory], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting needs root: {mounted.stderr.decode().strip()}")
    yield directory
    subprocess.run(["umount", directory], check=True)


def test_a_full_disk_ends_the_save_in_words_and_leaves_the_older_checkpoint(
    ranks: RankPool, recipe: str, small_disk: Path, tmp_path: Path
):
    # From nothing left, over each file of a checkpoint that may be the one that does not fit, to enough.
    free = [0, 400_000, 800_000, 900_000, 1_000_000, 1_100_000, 2_500_000]
    (refusals,) = ranks.run(
        RANKS + "save_onto",
        num_ranks=1,
        recipe=recipe,
        directory=str(small_disk),
        free=free,
        spare=str(tmp_path / "older"),
    )
    store = CheckpointStore(small_disk / "checkpoints")
    assert refusals[-1] == ""
    refused = [words for words in refusals if words]
    for words in refused:
        assert f"step 2: the checkpoint could not be written to {store.directory}" in words
        assert "the one of step 1 is untouched. Make room, then go on with --resume" in words
        assert re.search(r"; it takes 0\.8\d MiB, and [01]\.\d\d MiB are left there; ", words)
    assert sum("there is no room for it" in words for words in refused) >= 2
    assert sum("No space left on device" in words or "in full" in words for words in refused) >= 2
    assert store.steps() == [1, 2]
    assert damaged_files(store.path(1)) == damaged_files(store.path(2)) == []
    for file in (tmp_path / "older").iterdir():
        assert file.read_bytes() == (store.path(1) / file.name).read_bytes()


def test_a_kill_at_any_change_to_the_file_system_leaves_a_whole_checkpoint(
    ranks: RankPool, recipe: str, tmp_path: Path
):
    arguments = {"recipe": recipe, "directory": str(tmp_path)}
    (num_changes,) = ranks.run(RANKS + "save_under_observation", num_ranks=1, **arguments)
    stores = [CheckpointStore(tmp_path / f"before_{change}") for change in range(num_changes)]
    newest = [store.steps()[-1] for store in stores]
    for store, step in zip(stores, newest, strict=True):
        assert damaged_files(store.path(step)) == [], store.directory
    # Killed early the older one is the newest, killed late the new one: and never none between the two.
    assert newest == sorted(newest)
    assert newest.count(1) > 8
    assert newest.count(2) > 2


@pytest.mark.parametrize(
    ("rank", "event", "named", "newest"),
    [
        pytest.param(1, "open", "__1_0.distcp", 1, id="rank 1, writing its part"),
        pytest.param(0, "os.rename", ".step_2.part", 1, id="rank 0, before the checkpoint has its name"),
        pytest.param(0, "os.rename", ".latest.part", 2, id="rank 0, before the pointer"),
    ],
)
def test_one_of_two_ranks_killed_in_a_save_leaves_a_whole_checkpoint(
    ranks: RankPool, recipe: str, tmp_path: Path, rank: int, event: str, named: str, newest: int
):
    with pytest.raises(RankError):
        ranks.run(
            RANKS + "save_and_be_killed",
            num_ranks=2,
            recipe=recipe,
            options=["parallel.expert=2"],
            directory=str(tmp_path),
            rank=rank,
            event=event,
            named=named,
        )
    store = CheckpointStore(tmp_path)
    assert store.steps()[-1] == newest
    assert damaged_files(store.path(newest)) == []


@pytest.mark.parametrize(
    ("written", "after_bytes", "newest"),
    [
        pytest.param(".step_2.part/__0_0.distcp", 100_000, 1, id="the ranks' tensors"),
        pytest.param(".step_2.part/.metadata.tmp", 1000, 1, id="Megatron's index"),
        pytest.param(".step_2.part/random.pt", 1000, 1, id="the random generators"),
        pytest.param(".step_2.part/manifest.json", 100, 1, id="the manifest"),
        pytest.param(".latest.part", 5, 2, id="the pointer"),
    ],
)
def test_a_kill_in_the_middle_of_a_file_leaves_a_whole_checkpoint(
    ranks: RankPool, recipe: str, tmp_path: Path, written: str, after_bytes: int, newest: int
):
    with pytest.raises(RankError):
        ranks.run(
            RANKS + "save_and_be_killed",
            num_ranks=1,
            recipe=recipe,
            options=[],
            directory=str(tmp_path),
            rank=0,
            event="open",
            named=written,
            after_bytes=after_bytes,
        )
    # Files of tensors are written at the same time, and another may have been the first to grow so far.
    assert after_bytes in {file.stat().st_size for file in (tmp_path / written).parent.iterdir()}
    store = CheckpointStore(tmp_path)
    assert store.steps()[-1] == newest
    assert damaged_files(store.path(newest)) == []
