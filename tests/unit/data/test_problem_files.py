"""Problems from files: the layouts in use are understood, and a broken row is refused by name."""

import datetime
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_gspo.data.problem_files import JsonlProblems, ParquetProblems, open_problem_file
from megatron_gspo.types import UserError

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
GSM8K = {"question": "How many clips?", "answer": "She sold 48/2 = <<48/2=24>>24.\n48+24 = 72\n#### 72"}
AIME = {"id": 60, "problem": "Find $x$.", "solution": "So $x = \\boxed{204}$.", "answer": "204"}
MATH = {"problem": "Find $x$.", "solution": "So $x = \\boxed{204}$."}
DAPO = {"prompt": CHAT, "reward_model": {"ground_truth": "34", "style": "rule"}, "data_source": "math_dapo"}
OWN = {"prompt": "1+1=", "answer": 2}
OWN_CHAT = {"messages": CHAT, "answer": "4"}


def write_jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, *rows: dict[str, object]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path, row_group_size=2)
    return path


@pytest.mark.parametrize(
    ("row", "prompt", "answer", "worked_answer"),
    [
        (GSM8K, "How many clips?", "72", GSM8K["answer"]),
        (AIME, "Find $x$.", "204", AIME["solution"]),
        (MATH, "Find $x$.", MATH["solution"], MATH["solution"]),
        (DAPO, tuple(CHAT), "34", "34"),
        (OWN, "1+1=", "2", "2"),
        (OWN_CHAT, tuple(CHAT), "4", "4"),
    ],
    ids=["gsm8k", "aime", "math", "dapo", "own", "own chat"],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_layouts_in_use_are_understood(
    row: dict[str, object], prompt: object, answer: str, worked_answer: str, suffix: str, tmp_path: Path
) -> None:
    path = (write_jsonl if suffix == ".jsonl" else write_parquet)(tmp_path / f"problems{suffix}", row)

    problem = open_problem_file(path, "data.train").problem(0)

    assert problem.id == f"problems{suffix}:1"
    assert (problem.prompt, problem.answer, problem.worked_answer) == (prompt, answer, worked_answer)
    assert problem.reward == "math"
    assert problem.row == row


def test_ground_truth_goes_before_answer_and_null_is_absent(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "answer": "wrong", "reward_model": {"ground_truth": "right"}},
        {"prompt": None, "question": "q", "answer": "right", "reward_model": {"ground_truth": None}},
    ]

    problems = JsonlProblems(write_jsonl(tmp_path / "problems.jsonl", *rows))

    assert [problems.problem(index).answer for index in range(2)] == ["right", "right"]
    assert problems.problem(1).prompt == "q"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_problems_can_be_read_in_any_order(suffix: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"é{number}" * number, "answer": number} for number in range(1, 8)]
    path = (write_jsonl if suffix == ".jsonl" else write_parquet)(tmp_path / f"problems{suffix}", *rows)

    problems = open_problem_file(path, "data.train")

    assert problems.num_problems == 7
    assert [problems.problem(index).prompt for index in (6, 0, 3)] == ["é7" * 7, "é1", "é4" * 4]


def test_a_last_line_without_a_newline_counts(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text('{"prompt": "a", "answer": "1"}\n{"prompt": "b", "answer": "2"}')

    assert JsonlProblems(path).problem(1).prompt == "b"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"", "the line is empty"),
        (b'{"prompt": "p"', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"prompt": "\xff", "answer": "1"}', "not valid JSON"),
        (b'["p", "1"]', "a JSON list was given; an object"),
        (b'{"answer": "1"}', "no prompt field; one of prompt, messages, question, problem"),
        (b'{"prompt": "p"}', "no answer field; one of reward_model.ground_truth, answer, solution"),
        (b'{"prompt": 3, "answer": "1"}', "field 'prompt' is a number; a non-empty text"),
        (b'{"prompt": " ", "answer": "1"}', "field 'prompt' is empty"),
        (b'{"prompt": "\\ud800", "answer": "1"}', "field 'prompt' is not valid Unicode"),
        (b'{"question": ["p"], "answer": "1"}', "field 'question' is a list; a non-empty text"),
        (b'{"prompt": "p", "answer": true}', "field 'answer' is a boolean; a non-empty text or a number"),
        (b'{"prompt": "p", "answer": ""}', "field 'answer' is empty"),
        (b'{"prompt": "p", "answer": "worked\\n#### "}', "field 'answer' has nothing after '####'"),
        (b'{"prompt": "p", "reward_model": "34"}', "field 'reward_model' is a text; an object with ground_truth"),
        (b'{"messages": "hi", "answer": "1"}', "field 'messages' is a text; a list of {role, content}"),
        (b'{"messages": [], "answer": "1"}', "field 'messages' is an empty list"),
        (b'{"messages": ["hi"], "answer": "1"}', "field 'messages[0]' is a text; {role, content}"),
        (b'{"messages": [{"role": "user"}], "answer": "1"}', "field 'messages[0].content' is a null"),
        (
            b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "answer": "1"}',
            "field 'messages' ends with the assistant's turn",
        ),
    ],
)
def test_a_broken_line_is_refused_with_file_line_and_field(line: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_bytes(b'{"prompt": "p", "answer": "1"}\n' + line + b"\n")

    with pytest.raises(UserError) as refusal:
        JsonlProblems(path)

    assert str(refusal.value).startswith(f"{path}, line 2: {said}")
    assert "accepted" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_broken_parquet_row_is_refused_with_file_row_and_field(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "problems.parquet", OWN, OWN, {"prompt": "", "answer": 3})

    with pytest.raises(UserError, match=r"problems\.parquet, row 3: field 'prompt' is empty"):
        ParquetProblems(path)


def test_a_parquet_row_may_hold_what_json_cannot(tmp_path: Path) -> None:
    row = {"prompt": "p", "answer": "1", "made": datetime.date(2026, 1, 2)}

    assert ParquetProblems(write_parquet(tmp_path / "problems.parquet", row)).problem(0).row == row


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("problems.jsonl", b"", "the file holds no problems"),
        ("problems.parquet", b"not parquet at all", "not a readable Parquet file"),
        ("problems.jsonl", None, "data.train: there is no file"),
    ],
)
def test_a_file_without_problems_is_refused(name: str, content: bytes | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)

    with pytest.raises(UserError, match=said):
        open_problem_file(tmp_path / name, "data.train")
