"""Whatever a recipe gets wrong is answered with its place, its field, what was given, and what is accepted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_gspo.config import load_recipe
from megatron_gspo.config.fields import FIELDS, SECTIONS
from megatron_gspo.types import UserError

Write = Callable[..., Path]
Refuse = Callable[..., str]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("seed: x\n", ["recipe.yaml:8: seed is the text 'x'", "accepted: a whole number"]),
        ("seed: '3'\n", ["seed is the text '3'", "a whole number"]),
        ("seed: true\n", ["seed is true", "a whole number"]),
        ("seed: 1.0\n", ["seed is 1.0", "a whole number"]),
        ("seed:\n", ["seed is null", "a whole number"]),
        ("seed: [1]\n", ["seed is a list", "a whole number"]),
        ("seed: {a: 1}\n", ["seed is a mapping", "a whole number"]),
        ("seed: -1\n", ["seed is -1", "a number of at least 0"]),
        ("rollout:\n  temperature: true\n", ["recipe.yaml:9: rollout.temperature is true", "a number"]),
        ("rollout:\n  temperature: 0\n", ["rollout.temperature is 0", "a number above 0"]),
        ("rollout:\n  temperature: .nan\n", ["rollout.temperature is nan", "a finite number"]),
        ("rollout:\n  top_p: 1.5\n", ["rollout.top_p is 1.5", "a number of at most 1"]),
        ("rollout:\n  responses_per_prompt: 1\n", ["rollout.responses_per_prompt is 1", "at least 2"]),
        ("rollout:\n  engine: sglan\n", ["rollout.engine is the text 'sglan'", "'local' or 'sglang'", "name: sglang"]),
        ("routing:\n  replay: r4\n", ["routing.replay is the text 'r4'", "'off', 'r2' or 'r3'"]),
        ("routing:\n  replay: false\n", ["routing.replay is false", "'off', 'r2' or 'r3'"]),
        ("routing:\n  measure: 1\n", ["routing.measure is 1", "true or false"]),
        ("routing:\n  measure: maybe\n", ["routing.measure is the text 'maybe'", "true or false"]),
        ("routing: r2\n", ["recipe.yaml:8: routing is a section", "routing.replay, routing.measure"]),
        ("reward:\n  name: 3\n", ["reward.name is 3", "text"]),
        ("objective:\n  clip_low: 0.0\n", ["objective.clip_low is 0.0", "above 0"]),
        ("objective:\n  clip_low: 1\n", ["objective.clip_low is 1", "below 1"]),
        ("objective:\n  clip_high: -4e-4\n", ["objective.clip_high is -0.0004", "above 0"]),
        ("objective:\n  dual_clip: 1\n", ["objective.dual_clip is 1", "above 1"]),
        ("parallel:\n  tensor: 0\n", ["parallel.tensor is 0", "at least 1"]),
        ("parallel:\n  virtual_pipeline: 1\n", ["parallel.virtual_pipeline is 1", "at least 2"]),
        ("rollout:\n  close_at_fraction: 0\n", ["rollout.close_at_fraction is 0", "above 0"]),
        ("rollout:\n  max_staleness: 0\n", ["rollout.max_staleness is 0", "at least 1"]),
        ("warmstart:\n  wrong_step_fraction: 2\n", ["warmstart.wrong_step_fraction is 2", "at most 1"]),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_named_with_its_line(
    recipe_file: Write, refusal: Refuse, more: str, told: list[str]
) -> None:
    message = refusal(recipe_file(more))
    assert all(part in message for part in told), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("training.mini_batchs=4", "training.mini_batches"),
        ("trainig.steps=4", "training.steps"),
        ("clip_low=3e-4", "objective.clip_low"),
        ("training.temperature=1", "rollout.temperature or evaluation.temperature"),
        ("learning_rat=1e-6", "training.learning_rate or warmstart.learning_rate"),
        ("data.arithmetic_chain.max_operation=4", "data.arithmetic_chain.max_operations"),
        ("sead=3", "seed"),
        ("seed.x=3", "seed"),
    ],
)
def test_a_misspelt_field_is_answered_with_the_nearest_name(
    recipe_file: Write, refusal: Refuse, override: str, nearest: str
) -> None:
    message = refusal(recipe_file(), [override])
    field = override.partition("=")[0]
    assert message == f"command line: {field} is not a field; nearest name: {nearest}"


def test_a_misspelt_field_in_a_file_is_named_with_its_line(recipe_file: Write, refusal: Refuse) -> None:
    message = refusal(recipe_file("objective:\n  clip_lo: 3e-4\n"))
    assert message.endswith("recipe.yaml:9: objective.clip_lo is not a field; nearest name: objective.clip_low")


def test_a_field_like_no_other_is_answered_with_all_names_of_its_section(recipe_file: Write, refusal: Refuse) -> None:
    message = refusal(recipe_file(), ["routing.zzz=1"])
    assert message == "command line: routing.zzz is not a field; accepted: " + ", ".join(
        f"routing.{name}" for name in ("replay", "measure", "probe_every", "probe_responses", "routes_on_host")
    )


def test_every_problem_of_a_kind_has_a_line_of_its_own(recipe_file: Write, refusal: Refuse) -> None:
    lines = refusal(recipe_file("seed: x\n"), ["training.steps=0", "rollout.engine=vllm"]).splitlines()
    assert [line.partition(" is ")[0].rpartition(" ")[2] for line in lines] == [
        "seed",
        "rollout.engine",
        "training.steps",
    ]


def test_a_wrong_size_does_not_also_blame_the_default_that_follows_from_it(recipe_file: Write, refusal: Refuse) -> None:
    assert "parallel.data" not in refusal(recipe_file(), ["parallel.tensor=x"])


@pytest.mark.parametrize("field", ["model.path", "data.train", "training.steps", "training.prompts_per_step"])
def test_a_missing_field_is_named_with_what_it_is(recipe_file: Write, refusal: Refuse, field: str) -> None:
    name = field.partition(".")[2]
    path = recipe_file()
    path.write_text("".join(line for line in path.open() if f" {name}:" not in line))
    assert f"{path}: {field} is missing; accepted: " in refusal(path)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["training.mini_batches=3"],
            ["training.mini_batches is 3", "a divisor of training.prompts_per_step (16)"],
        ),
        (
            ["parallel.data=3", "training.prompts_per_step=16"],
            ["training.prompts_per_step is 16", "training.mini_batches (4) × parallel.data (3)"],
        ),
        (
            ["parallel.expert=4", "parallel.data=2"],
            ["parallel.expert is 4", "divides the 2 ranks", "(1 × 1 × 1 × 2)"],
        ),
        (["parallel.virtual_pipeline=2"], ["parallel.virtual_pipeline is 2", "null while parallel.pipeline is 1"]),
        (
            ["parallel.overlap_parameter_gather=true"],
            ["parallel.overlap_parameter_gather is true", "false unless", "parallel.overlap_gradient_reduce"],
        ),
        (
            [
                "parallel.overlap_parameter_gather=true",
                "parallel.overlap_gradient_reduce=true",
                "parallel.distributed_optimizer=false",
            ],
            ["parallel.overlap_parameter_gather is true", "parallel.distributed_optimizer"],
        ),
        (
            ["parallel.dispatcher=allgather", "parallel.expert=2"],
            [
                "parallel.dispatcher is the text 'allgather'",
                "alltoall where ranks of several replicas",
                "expert_tensor × expert (2)",
            ],
        ),
        (
            ["objective.constant_length=512"],
            ["objective.constant_length is 512", "null under objective.aggregation: sequence_mean"],
        ),
        (
            ["routing.replay=r2", "rollout.old_log_probs=engine"],
            ["routing.replay is the text 'r2'", "off or r3 under rollout.old_log_probs: engine"],
        ),
        (
            ["objective.truncated_importance_cap=2", "rollout.old_log_probs=engine"],
            ["objective.truncated_importance_cap is 2", "null under rollout.old_log_probs: engine"],
        ),
        (
            ["training.min_learning_rate=1e-3", "training.learning_rate=1e-4"],
            ["training.min_learning_rate is 0.001", "at most training.learning_rate (0.0001)"],
        ),
        (
            ["training.learning_rate_schedule=cosine", "training.warmup_updates=8"],
            ["training.warmup_updates is 8", "fewer than the run's 8 updates"],
        ),
        (
            ["evaluation.temperature=0", "evaluation.samples_per_prompt=4"],
            ["evaluation.samples_per_prompt is 4", "1 under evaluation.temperature: 0"],
        ),
        (
            ["rollout.one_step_ahead=true"],
            ["rollout.one_step_ahead is true", "false under rollout.engine: local"],
        ),
        (
            ["rollout.close_at_fraction=0.5", "environment.name=calculator"],
            ["rollout.close_at_fraction is 0.5", "1 under environment.name: calculator"],
        ),
        (
            ["rollout.engine=sglang", "rollout.sglang.release_memory=true", "rollout.one_step_ahead=true"],
            ["rollout.one_step_ahead is true", "false under rollout.sglang.release_memory: true"],
        ),
        (
            ["reward.overlong_buffer_tokens=65", "rollout.max_response_tokens=64"],
            ["reward.overlong_buffer_tokens is 65", "at most the 64 tokens of the longest response"],
        ),
        (
            ["data.arithmetic_chain.min_operations=9"],
            ["data.arithmetic_chain.min_operations is 9", "at most data.arithmetic_chain.max_operations (4)"],
        ),
        (
            ["data.train=aritmetic_chain"],
            ["data.train is the text 'aritmetic_chain'", ".jsonl or .parquet", "nearest name: arithmetic_chain"],
        ),
    ],
)
def test_fields_that_contradict_each_other_are_refused(
    recipe_file: Write, refusal: Refuse, overrides: list[str], told: list[str]
) -> None:
    message = refusal(recipe_file(), overrides)
    assert message.startswith("command line: ")
    assert all(part in message for part in told), message


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.steps", "command line: 'training.steps' has no `=`; accepted: section.field=value"),
        ("training=3", "command line: training is a section, not a field; accepted: training.steps, "),
        ("=3", "command line:  is not a field"),
        ("reward.name='it's'", "command line: reward.name:1: "),
    ],
)
def test_an_override_of_another_form_is_refused(recipe_file: Write, refusal: Refuse, override: str, told: str) -> None:
    assert refusal(recipe_file(), [override]).startswith(told)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", " is empty; accepted: a mapping of seed, model"),
        ("# nothing yet\n", " is empty; accepted: a mapping of seed, model"),
        ("- seed: 1\n", " is not a mapping; accepted: a mapping of seed, model"),
        ("seed 1\n", " is not a mapping; accepted: a mapping of seed, model"),
        ("training:\n\tsteps: 3\n", ":2: indented with a tab; accepted: spaces"),
        ("training: {steps: 3\nseed: 1\n", ":1: 'training: {steps: 3' is not YAML"),
        ("training:\n  steps 3\n  prompts_per_step: 4\n", ":3: 'prompts_per_step: 4' is not YAML"),
        ("seed: 1\nrouting\n", ":2: 'routing' is not YAML"),
        ("training:\n  steps: 3\n    mini_batches: 4\n", ":3: 'mini_batches: 4' is not YAML"),
        ("seed: 1\n---\nseed: 2\n", "is not YAML (but found another document)"),
        ("seed: 1\ntraining:\n  steps: 1\nseed: 2\n", ":4: seed is given twice (first in line 1); accepted: once"),
        ("training:\n  steps: 1\n  steps: 1\n", ":3: steps is given twice (first in line 2)"),
        ("seed: &a 1\ntraining:\n  steps: *a\n", ":3: an alias (*a); accepted: values written out"),
        ("seed: !!python/object/apply:os.getpid []\n", ":1: tag tag:yaml.org,2002:python/object/apply:os.getpid"),
        ("? [a]\n: 1\n", ":1: a list or mapping as a field's name; accepted: a name"),
        ("training.steps: 3\n", ":1: training.steps has a dot; accepted: fields indented"),
        ("seed: 1\x07\n", " is not text: it holds '\\x07'; accepted: YAML in UTF-8"),
    ],
)
def test_text_that_is_no_recipe_is_refused_with_its_line(
    recipe_file: Write, refusal: Refuse, text: str, told: str
) -> None:
    path = recipe_file(text, start="")
    message = refusal(path)
    assert message.startswith(str(path))
    assert told in message


def test_a_file_that_is_not_there_is_answered_with_the_nearest_name(recipe_file: Write, refusal: Refuse) -> None:
    path = recipe_file(name="tiny_gspo.yaml")
    message = refusal(path.with_name("tiny_gsop.yaml"))
    assert message.endswith("tiny_gsop.yaml does not exist; accepted: a recipe file; nearest name: tiny_gspo.yaml")


def test_a_directory_is_no_recipe(tmp_path: Path, refusal: Refuse) -> None:
    assert refusal(tmp_path) == f"{tmp_path} is a directory; accepted: a recipe file"


def test_bytes_that_are_no_text_are_no_recipe(tmp_path: Path, refusal: Refuse) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"seed: \xff\xfe")
    assert "accepted: YAML in UTF-8" in refusal(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("base", "told"),
    [
        (
            "bse.yaml",
            "child.yaml:1: base {directory}/bse.yaml does not exist; accepted: a recipe file; nearest name: base",
        ),
        ("3", "child.yaml:1: base is 3; accepted: a recipe file, relative to this one"),
        (".", "child.yaml:1: base {directory} is a directory"),
        ("child.yaml", "is based on this recipe (child.yaml → child.yaml); accepted: a recipe that is not"),
        ("loop.yaml", "is based on this recipe (child.yaml → loop.yaml → child.yaml); accepted: a recipe that is not"),
    ],
)
def test_a_base_that_cannot_be_one_is_refused(
    recipe_file: Write, refusal: Refuse, tmp_path: Path, base: str, told: str
) -> None:
    recipe_file(name="base.yaml")
    recipe_file("base: child.yaml\n", name="loop.yaml", start="")
    message = refusal(recipe_file(f"base: {base}\n", name="child.yaml", start=""))
    assert told.format(directory=tmp_path) in message


def test_what_a_base_gets_wrong_is_placed_in_the_base(recipe_file: Write, refusal: Refuse) -> None:
    recipe_file("seed: x\n", name="base.yaml")
    message = refusal(recipe_file("base: base.yaml\n", start=""))
    assert "base.yaml:8: seed is the text 'x'" in message


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.sampled_from([*FIELDS, *SECTIONS]),
    st.text(max_size=20)
    | st.integers().map(str)
    | st.floats().map(str)
    | st.sampled_from(["''", "off", "/x", "1e400"]),
)
def test_no_override_ends_in_a_traceback(recipe_file: Write, field: str, text: str) -> None:
    with contextlib.suppress(UserError):
        load_recipe(recipe_file(), [f"{field}={text}"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(st.sampled_from([*"\n\n  :-{}[]'\"*&!?|>#%@\t1\x85é", ": ", "- ", "seed", "model:", "---"]), max_size=12)
)
def test_no_file_ends_in_a_traceback(recipe_file: Write, pieces: list[str]) -> None:
    with pytest.raises(UserError):
        load_recipe(recipe_file("".join(pieces), start=""))
