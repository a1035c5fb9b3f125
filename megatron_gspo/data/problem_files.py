"""Problems from JSONL and Parquet files.

In: a file whose rows are laid out like this project's own (`prompt` or `messages`, `answer`), GSM8K's (`question`,
`answer` ending in `#### 72`), AIME's and MATH's (`problem`, `answer`, `solution`), or DAPO's and verl's (a chat in
`prompt`, `reward_model.ground_truth`). Out: `Problem`s by index.

Every row is checked when the file is opened, and a broken one is refused with its line. Of a JSONL file only the byte
offset of each line is kept, and a problem is read again when it is its turn; a Parquet file is kept as an Arrow table.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megatron_gspo.data.problems import Message, Problem
from megatron_gspo.types import UserError

FILE_SUFFIXES = (".jsonl", ".parquet")
_PROMPT_FIELDS = ("prompt", "messages", "question", "problem")
_ANSWER_FIELDS = ("reward_model.ground_truth", "answer", "solution")
_FINAL_ANSWER_MARK = "####"  # GSM8K: the worked answer, then this mark, then the number alone


class FileProblems(ABC):
    """A file's problems by index: a `ProblemSource` with an end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = path.stem

    @property
    @abstractmethod
    def num_problems(self) -> int:
        """How many rows the file has."""

    @abstractmethod
    def problem(self, index: int) -> Problem:
        """The problem of row `index`, from 0."""

    def demonstration(self, problem: Problem, rng: np.random.Generator, wrong_step_fraction: float) -> str:
        """The worked answer as it stands in the file; nothing about it is random."""
        assert problem.worked_answer is not None, "every row of a file has one"
        return problem.worked_answer


class JsonlProblems(FileProblems):
    """One JSON object a line.

    Raises:
        UserError: a line is not a problem, naming file, line, field and what is accepted; or the file is empty.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        offsets = [0]
        with path.open("rb") as file:
            for index, line in enumerate(file):
                self._parse(line, index)
                offsets.append(offsets[-1] + len(line))
        _refuse_empty(path, num_rows=len(offsets) - 1)
        self._offsets = np.array(offsets, dtype=np.int64)

    @property
    def num_problems(self) -> int:
        """How many lines the file has."""
        return len(self._offsets) - 1

    def problem(self, index: int) -> Problem:
        """The problem on line `index` + 1, read from the file."""
        with self._path.open("rb") as file:
            file.seek(self._offsets[index])
            return self._parse(file.readline(), index)

    def _parse(self, line: bytes, index: int) -> Problem:
        where = f"{self._path}, line {index + 1}"
        if not line.strip():
            raise UserError(f"{where}: the line is empty; one JSON object a line is accepted")
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not valid JSON ({error}); one JSON object a line is accepted") from error
        return problem_from_row(row, where=where, problem_id=f"{self._path.name}:{index + 1}")


class ParquetProblems(FileProblems):
    """One problem a row, with the fields of the JSONL form as columns.

    Raises:
        UserError: the file is not Parquet; a row is not a problem, naming file, row, field and what is accepted; or
            the file is empty.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet  # here, because it takes 30 MB of every rank, and few runs have such files

        super().__init__(path)
        try:
            self._table = pyarrow.parquet.read_table(path)
        except pyarrow.ArrowException as error:
            raise UserError(f"{path}: not a readable Parquet file ({error})") from error
        _refuse_empty(path, num_rows=self._table.num_rows)
        rows = (row for batch in self._table.to_batches() for row in batch.to_pylist())
        for index, row in enumerate(rows):
            self._parse(row, index)

    @property
    def num_problems(self) -> int:
        """How many rows the file has."""
        return self._table.num_rows

    def problem(self, index: int) -> Problem:
        """The problem of row `index`, from 0."""
        return self._parse(self._table.slice(index, 1).to_pylist()[0], index)

    def _parse(self, row: object, index: int) -> Problem:
        return problem_from_row(
            row, where=f"{self._path}, row {index + 1}", problem_id=f"{self._path.name}:{index + 1}"
        )


def open_problem_file(path: Path, field: str) -> FileProblems:
    """Open and check a file of problems; `field` is the recipe's field that named it.

    Raises:
        UserError: there is no such file, or its content is not accepted.
    """
    assert path.suffix in FILE_SUFFIXES, "the caller told files from tasks by this"
    if not path.is_file():
        raise UserError(f"{field}: there is no file {path}")
    return JsonlProblems(path) if path.suffix == ".jsonl" else ParquetProblems(path)


def problem_from_row(row: object, *, where: str, problem_id: str) -> Problem:
    """A row's problem. A null counts as an absent field.

    The prompt is the first of `prompt`, `messages`, `question`, `problem`; the answer the first of
    `reward_model.ground_truth`, `answer`, `solution`, of which only what follows a last `####` counts; the worked answer
    the first of `solution`, `answer`, and the answer itself.

    Raises:
        UserError: beginning with `where`, and naming the field, what it holds and what is accepted.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {_kind(row)} was given; an object with the problem's fields is accepted")
    present = {name: value for name, value in row.items() if value is not None}
    prompt_field = next((name for name in _PROMPT_FIELDS if name in present), None)
    if prompt_field is None:
        raise UserError(f"{where}: no prompt field; one of {', '.join(_PROMPT_FIELDS)} is accepted")
    answers = _answers(present, where)
    if not answers:
        raise UserError(f"{where}: no answer field; one of {', '.join(_ANSWER_FIELDS)} is accepted")
    final_field = next(name for name in _ANSWER_FIELDS if name in answers)
    final_answer = answers[final_field].rpartition(_FINAL_ANSWER_MARK)[2].strip()
    if not final_answer:
        raise UserError(
            f"{where}: field {final_field!r} has nothing after {_FINAL_ANSWER_MARK!r}; an answer is accepted"
        )
    return Problem(
        id=problem_id,
        prompt=_prompt(present[prompt_field], prompt_field, where),
        answer=final_answer,
        reward="math",
        worked_answer=answers.get("solution") or answers.get("answer") or final_answer,
        row=row,
    )


def _prompt(value: object, field: str, where: str) -> str | tuple[Message, ...]:
    if isinstance(value, list) and field in ("prompt", "messages"):
        return _chat(value, field, where)
    if field == "messages":
        raise UserError(f"{where}: field 'messages' is a {_kind(value)}; a list of {{role, content}} is accepted")
    return _text(value, field, where)


def _chat(value: list[object], field: str, where: str) -> tuple[Message, ...]:
    if not value:
        raise UserError(f"{where}: field {field!r} is an empty list; at least one message is accepted")
    chat = []
    for position, message in enumerate(value):
        if not isinstance(message, dict):
            raise UserError(
                f"{where}: field '{field}[{position}]' is a {_kind(message)}; {{role, content}} is accepted"
            )
        chat.append({key: _text(message.get(key), f"{field}[{position}].{key}", where) for key in ("role", "content")})
    if chat[-1]["role"] == "assistant":
        raise UserError(f"{where}: field {field!r} ends with the assistant's turn; a chat that awaits it is accepted")
    return tuple(chat)


def _answers(present: Mapping[str, object], where: str) -> dict[str, str]:
    """The answer fields that the row has, as text."""
    found = {name: present[name] for name in ("answer", "solution") if name in present}
    reward_model = present.get("reward_model")
    if reward_model is not None and not isinstance(reward_model, dict):
        raise UserError(
            f"{where}: field 'reward_model' is a {_kind(reward_model)}; an object with ground_truth is accepted"
        )
    if reward_model is not None and reward_model.get("ground_truth") is not None:
        found["reward_model.ground_truth"] = reward_model["ground_truth"]
    return {name: _text(value, name, where, numbers=True) for name, value in found.items()}


def _text(value: object, field: str, where: str, *, numbers: bool = False) -> str:
    accepted = "a non-empty text or a number" if numbers else "a non-empty text"
    if numbers and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{where}: field {field!r} is a {_kind(value)}; {accepted} is accepted")
    if not value.strip():
        raise UserError(f"{where}: field {field!r} is empty; {accepted} is accepted")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: field {field!r} is not valid Unicode ({error.reason}); {accepted} is accepted"
        ) from error
    return value


def _kind(value: object) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _refuse_empty(path: Path, num_rows: int) -> None:
    if num_rows == 0:
        raise UserError(f"{path}: the file holds no problems; at least one is accepted")
