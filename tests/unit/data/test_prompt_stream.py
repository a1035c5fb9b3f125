"""The stream of prompts: shuffled by seed, resumed exactly, rid of what is too long."""

import json
from pathlib import Path

import pytest

from megatron_gspo.config import DataSection
from megatron_gspo.data.prompts import PromptStream, open_prompts
from megatron_gspo.data.tasks import is_held_out
from megatron_gspo.data.tokenizer import build_byte_tokenizer
from megatron_gspo.types import Prompt, UserError

TOKENIZER = build_byte_tokenizer()
NUM_PROBLEMS = 10


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Ten problems; problem i's prompt has i + 1 tokens."""
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps({"prompt": "x" * (i + 1), "answer": i}) + "\n" for i in range(NUM_PROBLEMS)))
    return str(path)


def open_train(name: str, *, seed: int = 1, max_prompt_tokens: int = 100, **settings: object) -> PromptStream:
    data = DataSection.model_validate({"train": name, **settings})
    return open_prompts(name, "train", data, TOKENIZER, max_prompt_tokens, seed)


def answers(prompts: list[Prompt]) -> list[int]:
    return [int(prompt.answer) for prompt in prompts]


def test_every_epoch_has_every_problem_once_in_an_order_of_its_own(path: str) -> None:
    stream = open_train(path)
    epochs = [answers(stream.next_prompts(NUM_PROBLEMS)) for _ in range(3)]

    assert all(sorted(epoch) == list(range(NUM_PROBLEMS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_order_is_the_seeds(path: str) -> None:
    orders = [tuple(answers(open_train(path, seed=seed).next_prompts(NUM_PROBLEMS))) for seed in (1, 1, 2)]

    assert orders[0] == orders[1] != orders[2]


def test_without_shuffling_the_order_is_the_files(path: str) -> None:
    assert answers(open_train(path, shuffle=False).next_prompts(12)) == [*range(10), 0, 1]


def test_prompt_ids_stay_unique_when_a_problem_comes_again(path: str) -> None:
    prompts = open_train(path).next_prompts(3 * NUM_PROBLEMS)

    assert len({prompt.id for prompt in prompts}) == 3 * NUM_PROBLEMS


@pytest.mark.parametrize(("name", "max_prompt_tokens"), [("file", 8), ("arithmetic_chain", 10)])
def test_a_resumed_stream_goes_on_exactly(name: str, max_prompt_tokens: int, path: str) -> None:
    name = path if name == "file" else name
    uninterrupted = open_train(name, max_prompt_tokens=max_prompt_tokens).next_prompts(30)
    stopped = open_train(name, max_prompt_tokens=max_prompt_tokens)
    before = stopped.next_prompts(13)
    saved = json.loads(json.dumps(stopped.state()))

    resumed = open_train(name, max_prompt_tokens=max_prompt_tokens)
    resumed.load_state(saved)

    assert before + resumed.next_prompts(17) == uninterrupted


def test_a_cursor_of_another_run_is_refused(path: str) -> None:
    state = open_train(path, seed=1).state()

    with pytest.raises(UserError, match="the saved position is of a run with seed 1, this one has 2"):
        open_train(path, seed=2).load_state(state)


def test_prompts_that_are_too_long_are_left_out_and_counted(path: str) -> None:
    stream = open_train(path, max_prompt_tokens=7)
    prompts = stream.next_prompts(21)

    assert sorted(answers(prompts)) == sorted([*range(7)] * 3)
    assert stream.num_too_long == 3
    assert max(len(prompt.token_ids) for prompt in prompts) == 7


@pytest.mark.parametrize("name", ["file", "arithmetic_chain"])
def test_data_in_which_every_prompt_is_too_long_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text('{"prompt": "long", "answer": 1}\n' * 3)
    name = str(path) if name == "file" else name

    with pytest.raises(UserError, match=r"has a prompt of more than 3 tokens, which is rollout\.max_prompt_tokens"):
        open_train(name, max_prompt_tokens=3).next_prompts(1)


def test_the_only_short_prompt_is_found_in_every_epoch(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    rows = [{"prompt": "long" * 9, "answer": i} for i in range(9)] + [{"prompt": "s", "answer": 9}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    assert answers(open_train(str(path), max_prompt_tokens=4).next_prompts(50)) == [9] * 50


def open_eval(name: str, seed: int, max_prompt_tokens: int = 100) -> PromptStream:
    return open_prompts(name, "eval", DataSection(train="arithmetic_chain"), TOKENIZER, max_prompt_tokens, seed)


def test_evaluation_takes_a_files_first_prompts_whatever_the_seed(path: str) -> None:
    stream = open_eval(path, seed=5, max_prompt_tokens=8)
    before = stream.state()

    assert answers(stream.held_out_prompts(4)) == [0, 1, 2, 3]
    assert answers(stream.held_out_prompts(99)) == list(range(8))
    assert stream.state() == before
    assert stream.name == "problems"


def test_a_tasks_evaluation_problems_are_held_out_and_the_same_for_all_seeds() -> None:
    stream = open_eval("arithmetic_chain", seed=1)
    prompts = stream.held_out_prompts(32)

    assert prompts == open_eval("arithmetic_chain", seed=2).held_out_prompts(32)
    assert all(is_held_out(prompt.text) for prompt in prompts)
    assert not any(is_held_out(prompt.text) for prompt in open_train("arithmetic_chain").next_prompts(100))
    assert stream.name == "arithmetic_chain"


def test_a_task_prompt_says_how_its_responses_are_scored() -> None:
    (prompt,) = open_train("arithmetic_chain").next_prompts(1)

    assert prompt.metadata["reward"] == "last_digit"
    assert prompt.token_ids == tuple(prompt.text.encode())


def test_chats_go_through_the_template_and_texts_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    chat = {"messages": [{"role": "user", "content": "2+2?"}], "answer": 4}
    path.write_text(json.dumps(chat) + "\n" + json.dumps({"prompt": "2+2?", "answer": 4}) + "\n")
    templated = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"

    raw = open_train(str(path), shuffle=False).next_prompts(2)
    asked = open_train(str(path), shuffle=False, chat_template=True).next_prompts(2)

    assert [prompt.text for prompt in raw] == [templated, "2+2?"]
    assert [prompt.text for prompt in asked] == [templated, templated]
    assert raw[0].token_ids[:5] == (257, *b"user")


def test_a_chat_for_a_tokenizer_without_template_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "2+2?"}], "answer": 4}))
    tokenizer = build_byte_tokenizer()
    tokenizer.chat_template = None
    stream = open_prompts(str(path), "train", DataSection(train=str(path)), tokenizer, 100, 1)

    with pytest.raises(UserError, match=r"the tokenizer has no chat template, and problems\.jsonl:1 is a chat"):
        stream.next_prompts(1)


def test_a_chat_that_the_template_refuses_names_the_problem(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "tool", "content": "2+2?"}], "answer": 4}))
    tokenizer = build_byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('only users speak here') }}"
    stream = open_prompts(str(path), "train", DataSection(train=str(path)), tokenizer, 100, 1)

    with pytest.raises(UserError, match=r"problems\.jsonl:1: .* only users speak here"):
        stream.next_prompts(1)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("arithmetic_chian", r"data\.train: 'arithmetic_chian' .did you mean 'arithmetic_chain'\?"),
        ("problems.json", r"data\.train: 'problems\.json' is neither a \.jsonl or \.parquet file"),
        ("missing.jsonl", r"data\.train: there is no file missing\.jsonl"),
    ],
)
def test_a_name_that_is_no_data_is_refused(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        open_train(name)


@pytest.mark.parametrize("name", ["file", "arithmetic_chain"])
def test_unfinished_prompts_are_drawn_again_before_all_others(name: str, path: str) -> None:
    name = path if name == "file" else name
    stream = open_train(name)
    drawn = stream.next_prompts(15)
    unfinished = [drawn[12], drawn[3], drawn[10]]
    stream.unfinished = tuple(prompt.position for prompt in unfinished)
    expected = [drawn[3], drawn[10], drawn[12], *stream.next_prompts(2)]

    resumed = open_train(name)
    resumed.load_state(json.loads(json.dumps(stream.state() | {"cursor": 15})))
    assert resumed.next_prompts(1) == expected[:1]
    again = open_train(name)  # stopped once more, before it has drawn all of them
    again.load_state(json.loads(json.dumps(resumed.state())))
    assert again.next_prompts(4) == expected[1:]
