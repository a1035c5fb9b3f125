"""The program as a person runs it: whole runs of a tiny policy, and one clear line for every mistake.

What the start itself may change (a first run, a launched one, a refusal) is started anew; all others are forked.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from tests.end_to_end.program import Program
from tests.tiny_model import tiny_recipe, write_tiny_model

# What every run reports; a reference policy adds loss/kl, and R3 routing/engine_disagreement.
METRICS = {
    "step",
    "policy_version",
    "reward/mean",
    "reward/std",
    "reward/solved_fraction",
    "groups/zero_variance_fraction",
    "response/length_mean",
    "response/truncated_fraction",
    "loss/policy",
    "entropy/mean",
    "grad_norm",
    "lr",
    "ratio/token_log_std",
    "ratio/token_abs_log_max",
    "ratio/sequence_log_std",
    "ratio/sequence_abs_log_max",
    "ratio/effective_sample_fraction",
    "clip/token_fraction",
    "clip/sequence_fraction",
    "clip/low_fraction",
    "clip/high_fraction",
    "mismatch/log_prob_abs_mean",
    "mismatch/kl",
    "mismatch/token_log_std",
    "mismatch/sequence_log_std",
    "routing/change_rate",
    "routing/change_rate_layer_1",
    "routing/change_rate_layer_2",
    "routing/tokens_any_change",
    "routing/noise_floor",
    "routing/replayed_token_fraction",
    "routing/load_cv",
    "routing/entropy",
    "time/rollout_s",
    "time/reward_s",
    "time/old_policy_s",
    "time/update_s",
    "time/weight_sync_s",
    "time/volatility_s",
    "throughput/tokens_per_s",
    "memory/peak_gib",
}

RECIPES = Path(__file__).parents[2] / "recipes"

PROBLEMS = [
    {"question": "Ann has 3 apples and buys 4 more. How many?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
    {"question": "A box holds 1,000 pens. How many in 2 boxes?", "answer": "2 * 1,000 = 2,000\n#### 2,000"},
    {"question": "Ben’s book costs £12. He has £20. What is left?", "answer": "20 - 12 = 8\n#### 8"},
]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Start the program as a person does."""
    return subprocess.run(
        [sys.executable, "-m", "megatron_gspo", *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=900,
    )


def lines_of(run_directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("recipe")
    write_tiny_model(directory / "model")
    (directory / "tiny.yaml").write_text(
        tiny_recipe(
            directory / "model",
            reward={"name": "tests.end_to_end.graded_reward:share_of_odd_characters"},
            rollout={"temperature": 0.8},
        )
    )
    return directory / "tiny.yaml"


@pytest.fixture(scope="module")
def cold_start(recipe: Path, program: Program) -> Path:
    directory = recipe.parent / "cold_start"
    done = program.run("warmstart", recipe, "--output-dir", directory)
    assert done.returncode == 0, done.stderr
    assert "cold start 3/3" in done.stdout
    return directory


@pytest.fixture(scope="module")
def finished(recipe: Path, cold_start: Path) -> Path:
    directory = recipe.parent / "run"
    done = run("train", recipe, f"model.path={cold_start}", "logging.tensorboard=true", "--output-dir", directory)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert f"Next: megatron-gspo evaluate {directory}/recipe.yaml" in done.stdout
    return directory


def test_a_run_leaves_what_reports_read(finished: Path):
    names = {path.name for path in finished.iterdir()}
    assert {
        "recipe.yaml",
        "metrics.jsonl",
        "environment.json",
        "log.txt",
        "tensorboard",
        "volatility",
        "checkpoints",
    } <= names
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["packages"]["megatron-core"].startswith("0.16.")
    assert environment["num_ranks"] == 1


def test_every_step_has_the_contracted_metrics(finished: Path):
    before, *steps = lines_of(finished)
    assert set(before) >= {"step", "policy_version", "eval/arithmetic_chain/pass_at_1"}
    assert [line["step"] for line in steps] == [1, 2]
    assert [line["policy_version"] for line in steps] == [1, 2]
    for line in steps:
        assert set(line) >= METRICS
        # There was something to learn in every step, or what follows would hold of a run that does nothing.
        assert line["grad_norm"] > 0.01
        assert line["reward/std"] > 0.01
    assert "eval/arithmetic_chain/pass_at_1" in steps[-1]


def test_a_finished_run_is_reported_as_the_end_of_training_left_it(finished: Path):
    by_training = (finished / "report.html").read_text()
    done = run("report", finished, "--output", finished.parent / "again.html")
    assert done.returncode == 0, done.stderr
    assert re.search(r"What ran +gspo \(clip 0\.0003 / 0\.0004\)", done.stdout)
    assert re.search(r"How far +step 2 of 2", done.stdout)
    assert (finished.parent / "again.html").read_text() == by_training
    assert "the run ended in order" in (finished / "log.txt").read_text().splitlines()[-1]


def test_engine_and_trainer_agree_to_round_off_at_equal_weights(finished: Path):
    for line in lines_of(finished)[1:]:
        assert line["mismatch/log_prob_abs_mean"] < 1e-5
        assert 0 < line["mismatch/sequence_log_std"] < line["mismatch/token_log_std"] < 1e-5


def test_the_recipe_that_ran_is_written_resolved_and_runs_again(finished: Path, program: Program, tmp_path: Path):
    resolved = yaml.safe_load((finished / "recipe.yaml").read_text())
    assert (resolved["objective"]["clip_low"], resolved["objective"]["clip_high"]) == (3e-4, 4e-4)
    again = program.run("train", finished / "recipe.yaml", "--output-dir", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    timeless = [
        {name: value for name, value in line.items() if not name.startswith(("time/", "throughput/", "memory/"))}
        for line in (*lines_of(finished), *lines_of(tmp_path / "again"))
    ]
    # The same recipe, seed and machine: the same run, bit for bit.
    assert timeless[: len(timeless) // 2] == timeless[len(timeless) // 2 :]


def test_the_trained_policy_is_a_checkpoint_that_evaluates(finished: Path, program: Program):
    done = program.run("evaluate", finished / "recipe.yaml", "--checkpoint", finished / "checkpoints" / "hf_step_2")
    assert done.returncode == 0, done.stderr
    measured = re.search(r"eval/arithmetic_chain/pass_at_1: ([\d.]+)", done.stdout)
    assert measured is not None
    assert float(measured[1]) == pytest.approx(lines_of(finished)[-1]["eval/arithmetic_chain/pass_at_1"], abs=1e-4)


def test_two_tensor_parallel_ranks_do_the_run_of_one(recipe: Path, cold_start: Path, finished: Path, tmp_path: Path):
    done = run("train", recipe, f"model.path={cold_start}", "parallel.tensor=2", "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    for one, two in zip(lines_of(finished), lines_of(tmp_path / "run"), strict=True):
        for name in ("reward/mean", "loss/policy", "grad_norm", "entropy/mean", "clip/token_fraction"):
            if name in one:
                assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name


def test_experts_on_two_ranks_and_grpo_with_a_kl_penalty_and_truncated_importance(
    recipe: Path, cold_start: Path, program: Program, tmp_path: Path
):
    options = ["parallel.expert=2", "objective.name=grpo", "objective.kl_coefficient=0.01"]
    options += ["objective.truncated_importance_cap=2"]
    done = program.run(
        "train", recipe, f"model.path={cold_start}", *options, "--output-dir", tmp_path / "run", num_ranks=2
    )
    assert done.returncode == 0, done.stderr
    first, second = lines_of(tmp_path / "run")[1:]
    assert first["loss/kl"] >= 0
    assert second["loss/kl"] > 0
    for line in (first, second):  # one precision: the engine that samples is the trainer's policy up to round-off
        assert line["mismatch/importance_weight_mean"] == pytest.approx(1, abs=1e-5)
        assert line["mismatch/importance_truncated_fraction"] == 0


def test_the_engines_own_likelihoods_serve_as_the_old_policy(
    recipe: Path, cold_start: Path, program: Program, tmp_path: Path
):
    options = [f"model.path={cold_start}", "rollout.old_log_probs=engine"]
    done = program.run("train", recipe, *options, "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    for line in lines_of(tmp_path / "run")[1:]:
        assert 0 < line["mismatch/log_prob_abs_mean"] < 1e-5
        assert line["ratio/token_abs_log_max"] > 0


def test_responses_of_several_turns_are_learned_from_where_the_policy_wrote_them(
    recipe: Path, program: Program, tmp_path: Path
):
    options = ["environment.name=tests.unit.rollout.talkative:Talkative", "environment.max_observation_tokens=8"]
    options += ["objective.name=gspo_token", "routing.replay=r3", "parallel.tensor=2"]
    done = program.run("train", recipe, *options, "--output-dir", tmp_path / "run", num_ranks=2)
    assert done.returncode == 0, done.stderr
    for line in lines_of(tmp_path / "run")[1:]:
        assert 1.5 < line["response/turns_mean"] <= 4
        assert line["response/observation_tokens_mean"] >= 3 * line["response/turns_mean"]
        assert line["rollout/num_environment_failures"] == 0
        assert line["reward/mean"] > 0.25  # a quarter a turn that ended by itself
        # Each sampled token is scored where it was sampled, and each token's experts, the environment's too, are replayed.
        assert line["mismatch/log_prob_abs_mean"] < 1e-5
        assert line["routing/engine_disagreement"] == 0.0
        assert line["routing/replayed_token_fraction"] == 1.0
        assert line["grad_norm"] > 0.01


def test_real_problems_run_the_same_path_and_are_scored_right(recipe: Path, program: Program, tmp_path: Path):
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    options = [f"data.train={problems}", f"data.eval={problems}", "training.prompts_per_step=2", "reward.name=task"]
    done = program.run("train", recipe, *options, "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "the policy starts from random ones" in done.stderr
    for line in lines_of(tmp_path / "run")[1:]:
        assert line["reward/mean"] == 0.0
        assert line["reward/num_failed"] == 0.0
        assert line["groups/zero_variance_fraction"] == 1.0
        assert line["grad_norm"] == 0.0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["objective.clip_hihg=0.1"], r"command line: .*objective\.clip_hihg.*clip_high"),
        (["objective.name=gsop"], r"objective\.name.*'gsop'.*gspo"),
        (["parallel.tensor=3"], r"parallel\.tensor"),
        (["rollout.responses_per_prompt=1"], r"rollout\.responses_per_prompt"),
        (["data.train=nowhere.jsonl"], r"data\.train.*nowhere\.jsonl"),
        (["reward.name=exat"], r"reward\.name.*exact"),
        (["rollout.engine=sglang"], r"model\.path: .*names no architectures, by which SGLang chooses"),
    ],
)
def test_a_mistake_in_the_recipe_is_one_clear_line_and_status_2(
    arguments: list[str], expected: str, recipe: Path, program: Program, tmp_path: Path
):
    done = program.run("train", recipe, *arguments, "--output-dir", tmp_path / "run")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(expected, done.stderr), done.stderr
    assert not list(tmp_path.glob("run/*.jsonl"))


@pytest.mark.parametrize(("name", "fraction"), [("tiny_grpo_r2", 1.0), ("tiny_grpo_r3", 1.0), ("tiny_grpo", 0.0)])
def test_the_shipped_recipes_replay_and_measure_above_the_noise_floor(
    name: str, fraction: float, program: Program, tmp_path: Path
):
    options = ["reward.name=tests.end_to_end.graded_reward:share_of_odd_characters", "training.steps=2"]
    options += ["training.prompts_per_step=4", "evaluation.prompts=1", "training.learning_rate=0.003"]
    done = program.run("train", RECIPES / f"{name}.yaml", *options, "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    for line in lines_of(tmp_path / "run")[1:]:
        assert line["routing/replayed_token_fraction"] == fraction
        assert line["routing/change_rate"] > line["routing/noise_floor"]


def test_weights_that_are_not_finite_end_the_run_in_one_line(
    recipe: Path, cold_start: Path, program: Program, tmp_path: Path
):
    shutil.copytree(cold_start, tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["model.layers.0.mlp.gate.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    done = program.run("train", recipe, f"model.path={tmp_path / 'broken'}", "--output-dir", tmp_path / "run")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "logits are not finite" in done.stderr


def test_a_directory_that_cannot_be_written_is_refused_before_anything_is_built(recipe: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    for command in ("train", "warmstart"):
        done = run(command, recipe, "--output-dir", tmp_path / "file" / "run")
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert "cannot be written (Not a directory)" in done.stderr


def test_a_run_is_never_written_over_another(recipe: Path, finished: Path):
    before = (finished / "metrics.jsonl").read_text()
    done = run("train", recipe, "--output-dir", finished)
    assert done.returncode == 2
    assert "holds a run already" in done.stderr
    assert (finished / "metrics.jsonl").read_text() == before


def test_a_broken_line_of_data_is_named_by_file_and_line(recipe: Path, program: Program, tmp_path: Path):
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps(PROBLEMS[0]) + "\n{'question': broken\n")
    done = program.run("train", recipe, f"data.train={problems}", "--output-dir", tmp_path / "run")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert re.search(r"problems\.jsonl.*\b2\b", done.stderr), done.stderr


def test_doctor_says_that_training_can_run_here(program: Program):
    done = program.run("doctor")
    assert done.returncode == 0, done.stderr
    assert "Training can run here" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--help"], 0, "warmstart"),
        (["train", "{recipe}", "objective.clip_hihg=0.1", "--output-dir", "{run}"], 2, "clip_high"),
        (["train", "{recipe}", "data.train=nowhere.jsonl", "--output-dir", "{run}"], 2, "which is not a file"),
        (["warmstart", "{recipe}", "reward.name=exat", "--output-dir", "{run}"], 2, "did you mean 'exact'"),
    ],
    ids=["help", "unknown field", "missing data", "unknown reward"],
)
def test_what_needs_no_rank_is_answered_without_importing_torch(
    arguments: list[str], status: int, expected: str, recipe: Path, tmp_path: Path
):
    given = [argument.format(recipe=recipe, run=tmp_path / "run") for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "megatron_gspo", *given],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == status
    assert expected in done.stdout + done.stderr
    assert not re.search(r"\|\s+(torch|transformers)$", done.stderr, re.MULTILINE)
    if status == 0:
        assert not re.search(r"\|\s+(numpy|pydantic)$", done.stderr, re.MULTILINE)
