"""How a job's servers and its trainer find each other, without starting a server."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from megatron_gspo.cli import main
from megatron_gspo.config import Recipe, load_recipe
from megatron_gspo.launch import Node
from megatron_gspo.rollout.serve import find_servers, private_address, serve
from megatron_gspo.types import UserError
from tests.tiny_model import tiny_recipe, write_tiny_model


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    model = write_tiny_model(tmp_path / "model", architectures=["Qwen3MoeForCausalLM"])
    (tmp_path / "recipe.yaml").write_text(tiny_recipe(model))
    return tmp_path / "recipe.yaml"


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    return load_recipe(recipe_file, ["rollout.engine=sglang"])


def announce(directory: Path, machine: int, *urls: str) -> None:
    (directory / f"servers_{machine}_of_11.json").write_text(json.dumps(urls))


def test_servers_are_found_once_every_machine_has_named_its_own(tmp_path: Path):
    for machine in range(10):
        announce(tmp_path, machine, f"http://10.0.0.{machine}:30000", f"http://10.0.0.{machine}:30001")
    with pytest.raises(UserError, match="does not name all SGLang servers"):
        find_servers(tmp_path, timeout_s=0.0)
    announce(tmp_path, 10, "http://10.0.0.10:30000")
    found = find_servers(tmp_path, timeout_s=0.0)
    assert found[:2] == ["http://10.0.0.0:30000", "http://10.0.0.0:30001"]
    assert (len(found), found[-1]) == (21, "http://10.0.0.10:30000")


def test_servers_listen_where_the_machines_name_leads_and_only_if_that_is_private(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    assert private_address({"SLURMD_NODENAME": "10.1.2.3"}) == "10.1.2.3"
    for environment in ({}, {"SLURMD_NODENAME": "8.8.8.8"}, {"MASTER_ADDR": "127.0.0.1"}):
        with pytest.raises(
            UserError, match=r"is known by .*accepted: a machine whose name stands for a private address"
        ):
            private_address(environment)


def test_a_recipe_without_servers_of_its_own_is_not_served(recipe: Recipe, tmp_path: Path):
    local = recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"engine": "local"})})
    with pytest.raises(UserError, match="the recipe asks for no servers"):
        serve(local, tmp_path, tmp_path / "logs", Node(), on_cpu=True)


def test_nothing_is_served_without_a_key_of_ones_own(recipe: Recipe, tmp_path: Path):
    with pytest.raises(UserError, match="key cannot be read"):
        serve(recipe, tmp_path, tmp_path / "logs", Node(), on_cpu=True)
    (tmp_path / "key").write_text("key")
    (tmp_path / "key").chmod(0o644)
    with pytest.raises(UserError, match="others can read the key"):
        serve(recipe, tmp_path, tmp_path / "logs", Node(), on_cpu=True)
    assert not (tmp_path / "logs").exists()


def test_servers_for_an_engine_that_asks_none_are_refused(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["train", str(recipe_file), "--output-dir", str(tmp_path / "run"), "--servers", str(tmp_path)]
    assert main(words) == 2
    assert "--servers: rollout.engine is local; accepted: sglang" in capsys.readouterr().err
