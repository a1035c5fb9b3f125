"""The search for layouts, and the tool that prints it."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from megatron_gspo.config import load_recipe
from megatron_gspo.memory import fitting_layouts, possible_layouts
from megatron_gspo.memory.layouts import smallest_layout
from megatron_gspo.model.build import check_layout, read_hf_config
from tests.tiny_models import dense_config
from tools import plan as tool

REPOSITORY = Path(__file__).parents[3]
RECIPE = REPOSITORY / "recipes/qwen3_30b_a3b_gspo.yaml"


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What `python tools/plan.py ARGUMENTS` does, without the start of a process."""
    printed, complaint = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as here, redirect_stdout(printed), redirect_stderr(complaint):
        here.chdir(REPOSITORY)
        here.setenv("COLUMNS", "120")
        here.setattr(sys, "argv", ["plan.py", *arguments])
        try:
            status = tool.main()
        except SystemExit as end:
            status = int(end.code or 0)
    return subprocess.CompletedProcess(arguments, status, printed.getvalue(), complaint.getvalue())


def test_every_layout_found_fills_the_gpus_and_can_be_built() -> None:
    recipes = possible_layouts(load_recipe(RECIPE), 64, gpus_per_node=8)
    sizes = {tuple(recipe.parallel.model_dump().items()) for recipe in recipes}
    assert len(sizes) == len(recipes) > 50
    hf_config = read_hf_config(recipes[0].model.path)
    for recipe in recipes:
        assert recipe.parallel.world_size == 64
        check_layout(hf_config, recipe.model, recipe.parallel)  # raises


def test_a_dense_model_has_layouts_without_experts(tmp_path: Path) -> None:
    dense_config().save_pretrained(tmp_path)
    recipe = load_recipe(REPOSITORY / "recipes/tiny_gspo.yaml", [f"model.path={tmp_path}"])
    recipes = possible_layouts(recipe, 4, gpus_per_node=8)
    assert {candidate.parallel.tensor for candidate in recipes} == {1, 2, 4}
    assert {candidate.parallel.expert for candidate in recipes} == {1}
    (best,) = fitting_layouts(recipes, 16, most=1)
    assert load_recipe(REPOSITORY / "recipes/tiny_gspo.yaml", [f"model.path={tmp_path}", *best.overrides().split()])
    assert "routing cache" not in best.memory.parts_gib


def test_the_recipes_own_layout_is_among_those_found() -> None:
    given = load_recipe(RECIPE)
    found = [recipe.parallel for recipe in possible_layouts(given, 32, gpus_per_node=8)]
    assert given.parallel in found


def test_the_best_comes_first_and_what_crosses_nodes_last() -> None:
    recipes = possible_layouts(load_recipe(RECIPE), 32, gpus_per_node=8)
    crosses = [
        (recipe.parallel.tensor > 8, recipe.parallel.expert * recipe.parallel.expert_tensor_size > 8)
        for recipe in recipes
    ]
    assert crosses == sorted(crosses)
    within = [recipe.parallel.pipeline for recipe, group in zip(recipes, crosses, strict=True) if not any(group)]
    assert within == sorted(within)
    assert within[-1] > 1


def test_what_fits_fits_and_the_nearest_needs_least() -> None:
    recipes = possible_layouts(load_recipe(RECIPE), 32, gpus_per_node=8)
    fitting = fitting_layouts(recipes, 45, most=5)
    assert len(fitting) == 5
    assert all(layout.memory.total_gib <= 45 for layout in fitting)
    least = smallest_layout(recipes).memory.total_gib
    assert fitting_layouts(recipes, least - 0.001, most=1) == []
    assert fitting_layouts(recipes, least, most=1)[0].memory.total_gib == least


def test_the_documentation_shows_what_the_tool_prints() -> None:
    text = (REPOSITORY / "docs/scale.md").read_text()
    shown = re.findall(r"^\$ python tools/plan.py (.+)\n([^$`]+)", text, re.MULTILINE)
    assert len(shown) == 3
    for arguments, output in shown:
        printed = plan(*arguments.split()).stdout
        assert [line.rstrip() for line in printed.splitlines()] == output.rstrip().splitlines()


def test_the_tool_says_what_fits_in_json() -> None:
    printed = subprocess.run(
        [sys.executable, "tools/plan.py", str(RECIPE), "--gpus", "32", "--gpu-memory", "80", "--json"],
        cwd=REPOSITORY,
        env={"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert printed.returncode == 0, printed.stderr
    found = json.loads(printed.stdout)
    assert found["recipe"]["fits"]
    assert found["recipe"]["parallel"]["data"] == 8
    assert found["recipe"]["worst_rank"]["holds"] == "embedding and output layer"
    assert len(found["layouts"]) == 10


def test_the_tool_says_by_how_much_it_does_not_fit() -> None:
    larger = REPOSITORY / "recipes/qwen3_235b_a22b_gspo.yaml"
    printed = plan(str(larger), "--gpus", "32", "--gpu-memory", "80")
    assert printed.returncode == 1
    assert "does not run on 32 × 80 GiB" in printed.stdout  # its 32 expert ranks in 2 stages are 64
    assert "No layout fits 32 × 80 GiB" in printed.stdout
    tight = plan(str(RECIPE), "--gpus", "32", "--gpu-memory", "40")
    assert tight.returncode == 1
    assert "does not fit by 4.5 GiB" in tight.stdout
    assert "Layouts that fit" in tight.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["absent.yaml", "--gpus", "8", "--gpu-memory", "80"], "absent.yaml"),
        ([str(RECIPE), "--gpus", "0", "--gpu-memory", "80"], "--gpus is 0; accepted: a number above 0"),
        ([str(RECIPE), "--gpus", "many", "--gpu-memory", "80"], "--gpus"),
        ([str(RECIPE), "parallel.tensr=2", "--gpus", "8", "--gpu-memory", "80"], "parallel.tensr is not a field"),
    ],
)
def test_bad_input_is_one_line_with_status_2(arguments: list[str], said: str) -> None:
    printed = plan(*arguments)
    assert printed.returncode == 2
    assert len(printed.stderr.splitlines()) == 1
    assert said in printed.stderr
    assert printed.stdout == ""
