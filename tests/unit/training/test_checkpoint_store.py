"""Checkpoint directories: whole or not there, the newest kept, damage named."""

import hashlib
from pathlib import Path

import pytest

from megatron_gspo.training.checkpoint_store import CheckpointStore, Manifest, damaged_files, file_names, hash_files


def save(store: CheckpointStore, step: int, *, keep: int = 2) -> None:
    aside = store.start(step)
    (aside / "weights.bin").write_bytes(bytes([step]) * 100)
    (aside / "state.json").write_text("{}")
    store.finish(step, aside, hash_files(aside, file_names(aside)), keep=keep)
    store.remove_leftovers()


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def test_the_newest_are_kept(store: CheckpointStore):
    for step in (2, 4, 6, 10):
        save(store, step)
    assert store.steps() == [6, 10]
    assert store.pointer_problem() is None
    assert {path.name for path in store.directory.iterdir()} == {"step_6", "step_10", "latest"}


def test_what_is_superseded_is_out_of_sight_before_it_is_deleted(store: CheckpointStore):
    save(store, 2, keep=1)
    store.finish(4, store.start(4), {}, keep=1)
    assert store.steps() == [4]
    assert {path.name for path in store.directory.iterdir()} == {".step_2.old", "step_4", "latest"}
    store.remove_leftovers()
    assert {path.name for path in store.directory.iterdir()} == {"step_4", "latest"}


def test_what_was_not_finished_does_not_count_and_goes_with_the_next_save(store: CheckpointStore):
    save(store, 2)
    (store.start(4) / "weights.bin").write_bytes(b"half")
    assert store.steps() == [2]
    save(store, 6)
    assert {path.name for path in store.directory.iterdir()} == {"step_2", "step_6", "latest"}


def test_going_on_from_an_older_checkpoint_gives_up_the_later_ones(store: CheckpointStore):
    for step in (2, 4):
        save(store, step)
    save(store, 3)
    assert store.steps() == [2, 3]


def test_a_step_saved_again_replaces_its_checkpoint(store: CheckpointStore):
    save(store, 2)
    (store.path(2) / "weights.bin").write_bytes(b"damaged")
    save(store, 2)
    assert damaged_files(store.path(2)) == []


def test_a_checkpoint_that_was_hashed_by_sha256_is_still_verified(store: CheckpointStore):
    save(store, 2)
    hashes = {
        name: hashlib.sha256((store.path(2) / name).read_bytes()).hexdigest() for name in ("state.json", "weights.bin")
    }
    (store.path(2) / "manifest.json").write_text(Manifest("sha256", hashes).text)
    assert damaged_files(store.path(2)) == []
    (store.path(2) / "state.json").write_text("{ }")
    assert damaged_files(store.path(2)) == [store.path(2) / "state.json"]


@pytest.mark.parametrize("name", ["weights.bin", "state.json", "manifest.json"])
def test_any_flipped_byte_is_found_in_the_file_it_is_in(store: CheckpointStore, name: str):
    save(store, 2)
    file = store.path(2) / name
    whole = file.read_bytes()
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        file.write_bytes(flipped)
        assert damaged_files(store.path(2)) == [file], position


def test_a_missing_file_is_damage(store: CheckpointStore):
    save(store, 2)
    (store.path(2) / "state.json").unlink()
    assert damaged_files(store.path(2)) == [store.path(2) / "state.json"]


def test_shares_of_the_files_add_up_to_all(store: CheckpointStore):
    save(store, 2)
    for name in ("weights.bin", "state.json"):
        (store.path(2) / name).write_text("other")
    found = [file.name for share in range(3) for file in damaged_files(store.path(2), share=share, num_shares=3)]
    assert sorted(found) == ["state.json", "weights.bin"]


@pytest.mark.parametrize("num_shares", [1, 3, 12])
def test_a_share_has_the_files_that_its_rank_wrote_where_as_many_wrote(store: CheckpointStore, num_shares: int):
    aside = store.start(2)
    written = [f"__{rank}_{part}.distcp" for rank in range(12) for part in range(2)]
    for name in (*written, "state.json", "common.pt"):
        (aside / name).write_text("whole")
    store.finish(2, aside, hash_files(aside, file_names(aside)), keep=1)
    for file in store.path(2).iterdir():
        if file.name != "manifest.json":
            file.write_text("other")
    path = store.path(2)
    shares = [damaged_files(path, share=share, num_shares=num_shares) for share in range(num_shares)]
    assert sorted(file.name for share in shares for file in share) == sorted([*written, "state.json", "common.pt"])
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    if num_shares == 12:
        for rank, share in enumerate(shares):
            assert {path / f"__{rank}_{part}.distcp" for part in range(2)} <= set(share)


@pytest.mark.parametrize("text", ["", "{", '{"checkpoint": "step_5"}', '{"checkpoint": 2}', "\xff"])
def test_a_damaged_pointer_is_named(store: CheckpointStore, text: str):
    save(store, 2)
    (store.directory / "latest").write_bytes(text.encode("latin-1"))
    assert str(store.directory / "latest") in (store.pointer_problem() or "")
    assert store.steps() == [2]
