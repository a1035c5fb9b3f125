"""What a recipe's text means, how its layers are put together, and that it is written back without loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_gspo.config import (
    BUILT_IN_TASKS,
    DataSection,
    ParallelSection,
    Recipe,
    dump_recipe,
    load_recipe,
    recipe_for_world_size,
    require_data_files,
)
from megatron_gspo.config.yaml_text import plain_scalar, read_yaml, write_yaml
from megatron_gspo.types import UserError

Write = Callable[..., Path]
Load = Callable[..., Recipe]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"),
        ("on", "on"),
        ("yes", "yes"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("1e-6", 1e-6),
        ("3E4", 3e4),
        (".5", 0.5),
        ("1.", 1.0),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("+7", 7),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2026-11-21", "2026-11-21"),
        ("-.inf", float("-inf")),
    ],
)
def test_unquoted_text_means_what_yaml_1_2_says(text: str, value: object) -> None:
    scalar = plain_scalar(text)
    assert scalar == value
    assert type(scalar) is type(value)


@pytest.mark.parametrize("quoted", ["'1e-6'", '"true"', "'off'", "'3'"])
def test_quoted_text_stays_text(quoted: str) -> None:
    assert read_yaml(quoted, "here").value == quoted[1:-1]


@given(
    st.dictionaries(
        st.text(st.characters(categories=("L", "N", "P", "S", "Z")), min_size=1),
        st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(),
        min_size=1,
    )
)
def test_values_written_are_read_back(values: dict[str, object]) -> None:
    fields = read_yaml(write_yaml(values), "here").value
    assert isinstance(fields, dict)
    assert {name: node.value for name, node in fields.items()} == values
    assert [type(node.value) for node in fields.values()] == [type(value) for value in values.values()]


@pytest.mark.parametrize("text", ["off", "'off'", '"off"'])
def test_replay_off_means_off(recipe_file: Write, text: str) -> None:
    assert load_recipe(recipe_file(f"routing:\n  replay: {text}\n")).routing.replay == "off"
    assert load_recipe(recipe_file(), [f"routing.replay={text}"]).routing.replay == "off"


@pytest.mark.parametrize(("text", "value"), [("off", False), ("on", True), ("false", False), ("true", True)])
def test_a_switch_takes_on_and_off_as_well_as_true_and_false(load: Load, text: str, value: bool) -> None:
    assert load(f"routing.measure={text}").routing.measure is value


@pytest.mark.parametrize(("text", "value"), [("1e-6", 1e-6), ("1", 1.0), ("5E-07", 5e-7), ("0.0001", 1e-4)])
def test_a_learning_rate_may_be_written_in_any_way_numbers_are(
    recipe_file: Write, load: Load, text: str, value: float
) -> None:
    in_file = load_recipe(recipe_file(f"  learning_rate: {text}\n"))
    rates = [in_file.training.learning_rate, load(f"training.learning_rate={text}").training.learning_rate]
    assert rates == [value, value]
    assert all(type(rate) is float for rate in rates)


def test_an_override_reaches_into_nested_sections(load: Load) -> None:
    assert load("data.arithmetic_chain.max_operations=4").data.arithmetic_chain.max_operations == 4


def test_an_override_may_say_null(load: Load) -> None:
    assert load("data.eval=arithmetic_chain", "data.eval=null").data.eval is None


def test_the_later_of_two_overrides_holds(load: Load) -> None:
    assert load("seed=2", "seed=3").seed == 3


def test_a_section_left_empty_has_its_defaults(recipe_file: Write, load: Load) -> None:
    assert load_recipe(recipe_file("routing:\n  # replay: r2\n")) == load()


def test_a_recipe_adds_to_its_base_field_by_field(recipe_file: Write) -> None:
    recipe_file("objective:\n  clip_low: 0.1\n  clip_high: 0.3\n", name="base.yaml")
    recipe_file("base: base.yaml\nobjective:\n  clip_high: 0.4\n", name="middle.yaml", start="")
    leaf = recipe_file("base: middle.yaml\nseed: 7\n", name="leaf.yaml", start="")
    recipe = load_recipe(leaf, ["objective.name=grpo"])
    objective = recipe.objective
    assert (recipe.seed, objective.name, objective.clip_low, objective.clip_high) == (7, "grpo", 0.1, 0.4)


def test_paths_are_relative_to_the_file_that_names_them(
    recipe_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "arms").mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    recipe_file(name="base.yaml")
    (elsewhere / "arms/child.yaml").write_text("base: ../../base.yaml\ndata:\n  train: problems.jsonl\n")
    recipe = load_recipe(Path("arms/child.yaml"), ["data.eval=held_out/aime.parquet"])
    assert recipe.model.path == tmp_path / "model"
    assert recipe.data.train == str(elsewhere / "arms/problems.jsonl")
    assert recipe.data.eval == str(elsewhere / "held_out/aime.parquet")


@pytest.mark.parametrize("name", [*BUILT_IN_TASKS, "my_tasks.sorting:SortingTask"])
def test_a_task_stays_a_name(load: Load, name: str) -> None:
    recipe = load(f"data.train={name}")
    assert recipe.data.train == name
    require_data_files(recipe)


@pytest.mark.parametrize("name", BUILT_IN_TASKS)
def test_every_built_in_task_has_its_settings(name: str) -> None:
    assert name in DataSection.model_fields


def test_a_data_file_is_required_to_exist_only_when_it_is_about_to_be_read(load: Load, tmp_path: Path) -> None:
    recipe = load(f"data.train={tmp_path}/problems.jsonl")
    with pytest.raises(UserError, match=r"data\.train is .*/problems\.jsonl, which is not a file; accepted: a \.jsonl"):
        require_data_files(recipe)
    (tmp_path / "problems.jsonl").touch()
    require_data_files(recipe)


def test_a_dumped_recipe_loads_to_an_equal_recipe_from_anywhere(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load(
        "parallel.expert=2",
        "training.learning_rate=1e-6",
        "logging.wandb_project='1e5'",
        f"data.eval={tmp_path}/#1: problems.jsonl",
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text(dump_recipe(recipe))
    monkeypatch.chdir("/")
    assert load_recipe(tmp_path / "run/recipe.yaml") == recipe


def test_a_dumped_recipe_holds_every_field(load: Load) -> None:
    dumped = dump_recipe(load())
    assert "base" not in dumped
    assert all(f"{name}:" in dumped for name in Recipe.model_fields)
    assert "data: 1\n" in dumped


@pytest.mark.parametrize(
    ("sizes", "data", "world_size"),
    [
        ({}, 1, 1),
        ({"tensor": 2}, 1, 2),
        ({"expert": 2}, 2, 2),
        ({"tensor": 2, "expert": 2, "expert_tensor": 1}, 1, 2),
        ({"tensor": 2, "expert": 2}, 2, 4),
        ({"tensor": 2, "pipeline": 2, "context": 2, "expert": 4, "expert_tensor": 1}, 1, 8),
        ({"tensor": 4, "expert": 8, "expert_tensor": 1, "data": 8}, 8, 32),
    ],
)
def test_without_a_word_on_replicas_there_are_as_few_as_hold_the_experts(
    sizes: dict[str, int], data: int, world_size: int
) -> None:
    parallel = ParallelSection(**sizes)
    assert (parallel.data, parallel.world_size) == (data, world_size)
    assert parallel.world_size % parallel.expert_model_size == 0


def test_a_launchers_ranks_decide_the_number_of_replicas(load: Load) -> None:
    recipe = load("parallel.tensor=2")
    resized = recipe_for_world_size(recipe, 8)
    assert (recipe.parallel.data, resized.parallel.data, resized.parallel.world_size) == (1, 4, 8)
    assert resized.training == recipe.training


@pytest.mark.parametrize(
    ("world_size", "told"),
    [
        (3, r"started 3 ranks; accepted: a multiple of parallel\.tensor × pipeline × context \(2 × 1 × 1\)"),
        (6, r"with the 6 ranks that the launcher started, training\.prompts_per_step is 16; accepted: a multiple"),
    ],
)
def test_ranks_that_cannot_be_divided_so_are_refused(load: Load, world_size: int, told: str) -> None:
    with pytest.raises(UserError, match=told):
        recipe_for_world_size(load("parallel.tensor=2"), world_size)


def test_a_recipe_cannot_be_changed(load: Load) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().training.steps = 3


def test_a_config_written_by_transformers_5_is_read_as_well(model: Callable[..., Path], load: Load) -> None:
    config = json.loads((model() / "config.json").read_text())
    model(num_experts=None, num_local_experts=config["num_experts"])
    assert load("parallel.expert=16", "training.mini_batches=1").parallel.world_size == 16
