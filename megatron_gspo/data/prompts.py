"""The stream of prompts that training and evaluation draw from.

In: a built-in task or a file of problems, and the policy's tokenizer. Out: tokenized `Prompt`s, in an order that seed and
cursor alone decide, so that a run that goes on from a saved cursor sees exactly the prompts it would have seen.

A file is shuffled anew in every epoch, holding one permutation of its indices; a task's problems are random as they are
and never end. Prompts longer than `rollout.max_prompt_tokens` are left out when they are met, and counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, cast

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from megatron_gspo.config import DataSection
from megatron_gspo.data.problem_files import FILE_SUFFIXES, open_problem_file
from megatron_gspo.data.problems import Problem, ProblemSource
from megatron_gspo.data.tasks import TASKS, Split, TaskProblems, build_task, is_task_name
from megatron_gspo.names import nearest_name
from megatron_gspo.types import Prompt, UserError

Kept = TypeVar("Kept")

_SHUFFLE_STREAM = 4  # random streams 1 to 3 are the tasks' splits
_MAX_LEFT_OUT_IN_A_ROW = 1_000  # of an endless source


class PromptEncoder:
    """Turns a problem into the text and the tokens that the policy reads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, chat_template: bool) -> None:
        """Chats always go through the tokenizer's chat template; texts do, as a user's turn, where `chat_template`."""
        self._tokenizer = tokenizer
        self._chat_template = chat_template

    def encode(self, problem: Problem) -> tuple[str, tuple[int, ...]]:
        """The prompt's text and token ids.

        Raises:
            UserError: a chat template is needed, and the tokenizer has none or it refuses the chat.
        """
        if isinstance(problem.prompt, str) and not self._chat_template:
            return problem.prompt, tuple(self._tokenizer(problem.prompt)["input_ids"])
        text = self._render(problem)
        # The template has written what special tokens there are.
        return text, tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render(self, problem: Problem) -> str:
        if self._tokenizer.chat_template is None:
            asked = "data.chat_template is true" if isinstance(problem.prompt, str) else f"{problem.id} is a chat"
            raise UserError(
                f"model.path: the tokenizer has no chat template, and {asked}; one that has one is accepted"
            )
        chat = [{"role": "user", "content": problem.prompt}] if isinstance(problem.prompt, str) else problem.prompt
        try:
            return cast(
                str, self._tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True)
            )
        except TemplateError as error:
            raise UserError(f"{problem.id}: the tokenizer's chat template refuses the chat: {error}") from error


@dataclass(frozen=True)
class Turn:
    """A problem whose turn it is."""

    problem: Problem
    position: int  # in the walk, from 0
    epoch: int  # how often every problem has had its turn before


class ProblemWalk:
    """The order problems are met in, and how far it has been walked: the cursor is one integer."""

    def __init__(self, source: ProblemSource, *, seed: int, shuffle: bool) -> None:
        self._source = source
        self._seed = seed
        self._shuffle = shuffle
        self.cursor = 0  # problems walked past, over all epochs
        self._permutation: tuple[int, np.ndarray] | None = None  # epoch, [num_problems] int64
        self._left_out: set[str] = set()

    @property
    def num_left_out(self) -> int:
        """Different problems refused by `keep` so far."""
        return len(self._left_out)

    def next_kept(self, keep: Callable[[Turn], Kept | None], refused_because: str) -> Kept:
        """What `keep` makes of the next problem for which it does not return None.

        Raises:
            UserError: no problem is left, all of them being refused.
        """
        source = self._source
        num_problems = source.num_problems
        # Two epochs in other orders can begin and end with the only problem that is kept.
        most_in_a_row = _MAX_LEFT_OUT_IN_A_ROW if num_problems is None else 2 * num_problems
        for _ in range(most_in_a_row):
            turn = self.turn(self.cursor)
            self.cursor += 1
            kept = keep(turn)
            if kept is not None:
                return kept
            self._left_out.add(turn.problem.id)
        raise UserError(f"{source.name}: every one of {num_problems or most_in_a_row} problems {refused_because}")

    def state(self) -> dict[str, object]:
        """Where the walk is, and of what: JSON types only."""
        return {"cursor": self.cursor} | self._identity()

    def load_state(self, state: Mapping[str, object]) -> None:
        """Go on where `state` was taken.

        Raises:
            UserError: the state is of other data, another seed, or another order.
        """
        for name, value in self._identity().items():
            if state[name] != value:
                raise UserError(
                    f"data.train: the saved position is of a run with {name} {state[name]!r}, this one has {value!r}; "
                    "to go on, the data, seed and shuffle that the run was started with are accepted"
                )
        cursor = state["cursor"]
        assert isinstance(cursor, int), "what `state` wrote"
        self.cursor = cursor

    def _identity(self) -> dict[str, object]:
        return {
            "source": self._source.name,
            "num_problems": self._source.num_problems,
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def turn(self, position: int) -> Turn:
        """Whose turn it is at `position`; the cursor does not move."""
        source = self._source
        if source.num_problems is None:
            return Turn(source.problem(position), position, epoch=0)
        epoch, index = divmod(position, source.num_problems)
        if self._shuffle:
            index = int(self._order(epoch, source.num_problems)[index])
        return Turn(source.problem(index), position, epoch)

    def _order(self, epoch: int, num_problems: int) -> np.ndarray:
        if self._permutation is None or self._permutation[0] != epoch:
            rng = np.random.default_rng([_SHUFFLE_STREAM, self._seed, epoch])
            self._permutation = (epoch, rng.permutation(num_problems))
        return self._permutation[1]


class PromptStream:
    """Prompts in their order, from a cursor that can be saved."""

    def __init__(
        self, source: ProblemSource, encoder: PromptEncoder, *, max_prompt_tokens: int, seed: int, shuffle: bool
    ) -> None:
        self.name = source.name
        self._source = source
        self._encoder = encoder
        self._max_prompt_tokens = max_prompt_tokens
        self._walk = ProblemWalk(source, seed=seed, shuffle=shuffle)
        self._to_draw_again: deque[int] = deque()  # positions before the cursor
        self.unfinished: tuple[int, ...] = ()
        """Positions of prompts that were drawn and are not done with. They are saved with the cursor, and a stream that
        goes on from there draws them again, before all others."""

    @property
    def num_too_long(self) -> int:
        """Different problems met since opening whose prompt is longer than `rollout.max_prompt_tokens`."""
        return self._walk.num_left_out

    def next_prompts(self, num_prompts: int) -> list[Prompt]:
        """The next prompts; the cursor moves past them. A problem met again in a later epoch has an id of its own.

        Raises:
            UserError: every prompt is too long.
        """
        return [self._next_prompt() for _ in range(num_prompts)]

    def held_out_prompts(self, num_prompts: int) -> list[Prompt]:
        """The source's first prompts that are short enough, always the same; fewer where a file has no more.

        The cursor does not move.

        Raises:
            UserError: every prompt is too long.
        """
        in_order = ProblemWalk(self._source, seed=0, shuffle=False)
        prompts: list[Prompt] = []
        while len(prompts) < num_prompts:
            prompt = in_order.next_kept(self._prompt, self._too_long())
            if self._source.num_problems is not None and in_order.cursor > self._source.num_problems:
                break  # this one is of the second round
            prompts.append(prompt)
        return prompts

    def state(self) -> dict[str, object]:
        """The cursor, the prompts before it that are not done with, and what identifies the data: JSON types only."""
        return self._walk.state() | {"unfinished": sorted({*self.unfinished, *self._to_draw_again})}

    def load_state(self, state: Mapping[str, object]) -> None:
        """Go on from a saved cursor.

        Raises:
            UserError: it was saved with other data, another seed, or another order.
        """
        self._walk.load_state(state)
        unfinished = state.get("unfinished", [])
        assert isinstance(unfinished, list), "what `state` wrote"
        self._to_draw_again, self.unfinished = deque(unfinished), ()

    def _next_prompt(self) -> Prompt:
        if not self._to_draw_again:
            return self._walk.next_kept(self._prompt, self._too_long())
        again = self._prompt(self._walk.turn(self._to_draw_again.popleft()))
        assert again is not None, "it was short enough before"
        return again

    def _prompt(self, turn: Turn) -> Prompt | None:
        problem = turn.problem
        text, token_ids = self._encoder.encode(problem)
        if len(token_ids) > self._max_prompt_tokens:
            return None
        return Prompt(
            id=problem.id if turn.epoch == 0 else f"{problem.id}@epoch{turn.epoch}",
            token_ids=token_ids,
            text=text,
            answer=problem.answer,
            metadata={"reward": problem.reward, "row": problem.row},
            position=turn.position,
        )

    def _too_long(self) -> str:
        return f"has a prompt of more than {self._max_prompt_tokens} tokens, which is rollout.max_prompt_tokens"


def open_source(name_or_path: str, field: str, data: DataSection, *, seed: int, split: Split) -> ProblemSource:
    """The task or file that the recipe's `field` names. `seed` and `split` choose a task's problems; a file has its own.

    Raises:
        UserError: it is neither, or the file is not what it must be.
    """
    if Path(name_or_path).suffix in FILE_SUFFIXES:
        return open_problem_file(Path(name_or_path), field)
    if is_task_name(name_or_path):
        return TaskProblems(build_task(name_or_path, data), seed, split)
    raise UserError(
        f"{field}: {name_or_path!r}{nearest_name(name_or_path, TASKS)} is neither a .jsonl or .parquet file, nor a task ({', '.join(TASKS)}), "
        f"nor package.module:attribute"
    )


def open_prompts(
    name_or_path: str,
    split: Literal["train", "eval"],
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    seed: int,
) -> PromptStream:
    """The prompts of `data.train` or `data.eval`.

    A task's evaluation problems are held out from training and do not depend on `seed`, so that runs with different
    seeds are measured on the same ones. `seed` shuffles a file where `data.shuffle`, and draws a task's problems.

    Raises:
        UserError: naming the recipe's field, or the file and its line.
    """
    source = open_source(
        name_or_path,
        f"data.{split}",
        data,
        seed=seed if split == "train" else 0,
        split="train" if split == "train" else "held_out",
    )
    encoder = PromptEncoder(tokenizer, chat_template=data.chat_template)
    return PromptStream(source, encoder, max_prompt_tokens=max_prompt_tokens, seed=seed, shuffle=data.shuffle)
