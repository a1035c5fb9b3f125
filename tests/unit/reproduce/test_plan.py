"""What the study runs, and in which order."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_gspo.config import load_recipe
from tools.reproduce.models import SHIPPED, model_config
from tools.reproduce.plan import make_plan, specs_of
from tools.reproduce.study import COMMON_RATE, CORE, FULL, LONG_TASK, MODELS, QUICK

OUTPUT = Path("/study")


def no_rate(arm: str) -> None:
    del arm


def plan(experiments=FULL, best_rate=no_rate):
    return make_plan(experiments, OUTPUT, best_rate)


def test_the_program_accepts_every_recipe_of_the_study():
    recipes = {}
    for task in plan().tasks:
        if task.spec is not None and task.spec.arm not in recipes:
            overrides = [argument for argument in task.arguments[2:-2] if not argument.startswith("model.path")]
            recipes[task.spec.arm] = load_recipe(Path(task.arguments[1]), overrides)
    assert set(CORE) < set(recipes)
    assert recipes["grpo_r2"].routing.replay == "r2"
    assert recipes["gspo_engine"].rollout.dtype == "bfloat16"
    assert recipes["grpo_tight"].objective.clip_low == 1.1e-3


def test_a_run_is_planned_once_and_after_its_cold_start():
    tasks = plan(best_rate=lambda arm: COMMON_RATE).tasks
    assert max(Counter(task.name for task in tasks).values()) == 1
    seen = set()
    for task in tasks:
        assert task.needs is None or task.needs in seen
        seen.add(task.directory)


def test_every_beginning_of_the_plan_has_all_arms_of_a_comparison_alike():
    quick = {spec.name for experiment in QUICK for spec in specs_of(experiment, no_rate)}
    order = [task.name for task in plan().tasks]
    for experiment in (*QUICK, *FULL):
        specs = {spec.name: spec for spec in specs_of(experiment, no_rate)}
        if experiment in FULL:
            specs = {name: spec for name, spec in specs.items() if name not in quick}
        seen = {}
        for spec in (specs[name] for name in order if name in specs):
            arms = seen.setdefault(spec.replicate, set())
            arms.add(spec.arm)
            unfinished = [
                key
                for key, found in seen.items()
                if found < {one.arm for one in specs.values() if one.replicate == key}
            ]
            assert len(unfinished) <= 1, experiment.name
        assert seen or not experiment.learning_rates


def test_what_the_quick_form_runs_comes_first():
    quick = {task.name for task in plan(QUICK).tasks}
    assert {task.name for task in plan().tasks[: len(quick)]} == quick


def test_comparisons_of_reward_have_five_seeds_and_two_cold_starts_first():
    for experiment in FULL:
        if experiment.name in ("common", "best", "clip", "off_policy", "engine"):
            first = experiment.replicates[:5]
            assert len({seed for seed, _ in first}) == 5
            assert len({cold_start for _, cold_start in first}) == 2


def test_an_arm_whose_best_rate_is_the_common_one_is_not_run_again():
    unknown = plan()
    known = plan(best_rate=lambda arm: COMMON_RATE)
    assert unknown.num_unknown == 40
    assert known.num_unknown == 0
    assert [task.name for task in known.tasks] == [task.name for task in unknown.tasks]


def test_the_sweep_chooses_with_seeds_that_nothing_is_compared_on():
    by_name = {experiment.name: experiment for experiment in FULL}
    assert not set(by_name["sweep"].replicates) & set(by_name["best"].replicates)


def test_the_quick_form_is_part_of_the_full_one_and_both_fit_their_time():
    quick, full = plan(QUICK), plan()
    assert {task.name for task in quick.tasks} < {task.name for task in full.tasks}
    # Two runs side by side; cores that share a chip are slower together, so a quarter is left over, or nearly.
    assert quick.cpu_s / 2 < 0.75 * 15 * 60
    assert full.cpu_s / 2 < 0.8 * 2 * 60 * 60


@pytest.mark.parametrize("name", sorted(MODELS))
def test_models_differ_from_the_shipped_one_in_what_they_are_named_for(name: str):
    shipped = json.loads((SHIPPED / "config.json").read_text())
    config = model_config(MODELS[name], shipped)
    assert config["num_hidden_layers"] == MODELS[name].layers
    experts = 3 * shipped["hidden_size"] * shipped["moe_intermediate_size"] * shipped["num_local_experts"]
    if MODELS[name].dense:
        assert 3 * config["hidden_size"] * config["intermediate_size"] == experts
        assert not [field for field in config if "expert" in field or "moe" in field]
    else:
        assert config == shipped | {
            "num_hidden_layers": MODELS[name].layers,
            "num_local_experts": MODELS[name].experts,
        }


def test_a_models_task_is_that_of_its_cold_start_and_of_its_runs():
    task = {f"{field}={value}" for field, value in LONG_TASK.items()}
    found = [one for one in plan().tasks if "moe_8_long" in one.name]
    assert len(found) == 2 + 4
    assert all(task <= set(one.arguments) for one in found)
    assert not any(task & set(one.arguments) for one in plan().tasks if "moe_8_long" not in one.name)
