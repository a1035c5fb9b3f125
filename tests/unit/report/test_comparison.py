"""Arms, measures and paired differences of runs whose numbers are known."""

import csv
import io
import json

import pytest

from megatron_gspo.report.arms import group_runs
from megatron_gspo.report.comparison import compare, compare_runs, comparison_page, to_csv, to_json
from megatron_gspo.report.read import read_run
from megatron_gspo.types import UserError
from tests.run_directories import write_run
from tests.tiny_model import write_tiny_model

GRPO = ("objective.name=grpo", "objective.clip_low=0.2", "objective.clip_high=0.27")


def level(reward):
    return {"reward/mean": reward}


def runs(tmp_path, *specifications):
    """Runs named a, b, …; each specification is recipe overrides, and settings of `write_run`."""
    written = [
        write_run(tmp_path / chr(ord("a") + index), *overrides, **settings)
        for index, (overrides, settings) in enumerate(specifications)
    ]
    return [read_run(path) for path in written]


@pytest.fixture
def paired(tmp_path):
    """GSPO at reward 0.5 and 0.7, GRPO at 0.4 and 0.55 (and clipping less), by seed."""
    rewards = [((), 1, 0.5), ((), 2, 0.7), (GRPO, 1, 0.4), (GRPO, 2, 0.55)]
    return runs(
        tmp_path, *[((*fields, f"seed={seed}"), {"changes": level(reward)}) for fields, seed, reward in rewards]
    )


def test_seeds_are_grouped_and_arms_named_by_what_tells_them_apart(tmp_path):
    found = group_runs(
        runs(
            tmp_path,
            (("seed=1",), {}),
            ((*GRPO, "seed=1"), {}),
            (("seed=2",), {}),
            ((*GRPO, "routing.replay=r2"), {}),
            ((*GRPO, "routing.replay=r2", "training.learning_rate=5e-4", "logging.tensorboard=false"), {}),
        )
    )
    names = ["gspo learning_rate=0.0002", "grpo learning_rate=0.0002"]
    names += ["grpo r2 learning_rate=0.0002", "grpo r2 learning_rate=0.0005"]
    assert [arm.name for arm in found.arms] == names
    assert [len(arm.runs) for arm in found.arms] == [2, 1, 1, 1]
    assert set(found.differences) == {
        "objective.name",
        "objective.clip_low",
        "objective.clip_high",
        "routing.replay",
        "training.learning_rate",
    }


def test_replay_is_named_also_where_the_objective_alone_tells_arms_apart(tmp_path):
    found = group_runs(runs(tmp_path, ((), {}), ((*GRPO, "routing.replay=r2"), {})))
    assert [arm.name for arm in found.arms] == ["gspo", "grpo r2"]


def test_cold_starts_that_recur_in_every_arm_are_replicates(tmp_path):
    starts = [write_tiny_model(tmp_path / name) for name in ("cold_1", "cold_2")]
    specifications = [((*fields, f"model.path={start}"), {}) for fields in ((), GRPO) for start in starts]
    found = group_runs(runs(tmp_path / "runs", *specifications))
    assert [arm.name for arm in found.arms] == ["gspo", "grpo"]
    assert [[start.rpartition("/")[2] for _, start in arm.runs] for arm in found.arms] == [["cold_1", "cold_2"]] * 2
    assert found.notes == []
    apart = group_runs([read_run(tmp_path / "runs" / "a"), read_run(tmp_path / "runs" / "d")])
    assert any(note.startswith("NOT LIKE WITH LIKE, another model") for note in apart.notes)


def test_other_tasks_are_refused_and_with_anyway_noted_loudly(tmp_path):
    two = runs(tmp_path, ((), {}), (("data.arithmetic_chain.max_operations=6",), {}))
    with pytest.raises(UserError, match=r"different tasks: a has data\.arithmetic_chain\.max_operations 4, b 6"):
        group_runs(two)
    assert group_runs(two, anyway=True).notes[0].startswith("NOT COMPARABLE")


@pytest.mark.parametrize(
    ("field", "what"),
    [
        ("evaluation.prompts=32", "evaluation"),
        ("training.prompts_per_step=32", "prompts"),
        ("rollout.temperature=0.7", "prompts"),
        ("model.dtype=bfloat16", "model"),
    ],
)
def test_what_makes_a_comparison_unfair_is_noted_loudly(field, what, tmp_path):
    page = comparison_page(compare_runs(runs(tmp_path, ((), {}), ((field,), {}))))
    name = field.partition("=")[0]
    assert [w.message for w in page.warnings] == [
        f"NOT LIKE WITH LIKE, another {what}: {name} differ between the runs."
    ]


def test_the_same_recipe_and_seed_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match="same recipe with the same seed"):
        group_runs(runs(tmp_path, ((), {}), ((), {})))


def test_measures_are_of_the_steps_that_all_runs_have(tmp_path):
    rising = {"reward/mean": lambda step: step / 100}
    comparison = compare_runs(
        runs(tmp_path, ((), {"changes": rising}), (GRPO, {"changes": rising, "steps": 20})), target_reward=0.1
    )
    assert comparison.grouping.common_steps == 20
    assert "where b ended" in comparison.grouping.notes[0]
    for result in comparison.results:
        values = {name: value for name, (value,) in result.values.items()}
        assert values["end_reward"] == pytest.approx(0.195)  # of steps 19 and 20
        assert values["area"] == pytest.approx(0.105)
        assert values["steps_to_reward"] == 12  # steps 8 to 12 average 0.1
        assert values["best_evaluation"] == pytest.approx(0.8)
        assert values["time_s"] == pytest.approx(60.0)
        assert values["tokens"] == pytest.approx(60_000)
        assert values["route_bytes"] == pytest.approx(16 * 60_000)
        assert values["collapsed"] == 0.0


def test_differences_are_taken_seed_by_seed(paired):
    (end,) = [found for found in compare_runs(paired).paired if found.measure == "end_reward"]
    assert (end.arm, end.baseline, end.difference.count) == ("grpo", "gspo", 2)
    # -0.10 and -0.15: half the spread times Student's 12.7 over √2
    assert end.difference.mean == pytest.approx(-0.125)
    assert end.difference.high == pytest.approx(-0.125 + 12.7062 * 0.0353553 / 2**0.5, rel=1e-4)


def test_a_reward_never_reached_is_none_and_counted(paired):
    comparison = compare_runs(paired, target_reward=0.6)
    assert comparison.results[0].values["steps_to_reward"] == [None, 5.0]
    page = comparison_page(comparison)
    (row,) = [row for row in page.tables[0].rows if row[0] == "Steps to the reward"]
    assert row[1:3] == ["5; 1 of 2 never", "none"]


def test_json_and_csv_hold_the_numbers_of_the_table(paired):
    comparison = compare_runs(paired)
    content = json.loads(to_json(comparison))
    assert [arm["name"] for arm in content["arms"]] == ["gspo", "grpo"]
    assert content["arms"][0]["means"]["end_reward"]["mean"] == pytest.approx(0.6)
    rows = list(csv.DictReader(io.StringIO(to_csv(comparison))))
    assert [(row["arm"], row["seed"], float(row["end_reward"])) for row in rows] == [
        ("gspo", "1", pytest.approx(0.5)),
        ("gspo", "2", pytest.approx(0.7)),
        ("grpo", "1", pytest.approx(0.4)),
        ("grpo", "2", pytest.approx(0.55)),
    ]


def test_one_run_is_no_comparison(tmp_path):
    path = write_run(tmp_path / "run")
    with pytest.raises(UserError, match="2 given, 1 different; accepted: two runs or more"):
        compare([path, path], tmp_path / "page.html")
