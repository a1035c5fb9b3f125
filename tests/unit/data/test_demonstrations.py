"""Demonstrations for the supervised cold start."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_gspo.config import DataSection
from megatron_gspo.data.demonstrations import DemonstrationStream, open_demonstrations
from megatron_gspo.data.tokenizer import build_byte_tokenizer
from megatron_gspo.types import UserError

TOKENIZER = build_byte_tokenizer()


def open_stream(name: str, *, max_response_tokens: int = 100, wrong_step_fraction: float = 0.0) -> DemonstrationStream:
    return open_demonstrations(
        name,
        DataSection(train=name),
        TOKENIZER,
        max_prompt_tokens=100,
        max_response_tokens=max_response_tokens,
        seed=1,
        wrong_step_fraction=wrong_step_fraction,
    )


def test_a_tasks_demonstration_solves_its_prompt_and_ends() -> None:
    for demonstration in open_stream("arithmetic_chain").next_demonstrations(50):
        prompt = TOKENIZER.decode(demonstration.prompt_token_ids)
        response = TOKENIZER.decode(demonstration.response_token_ids)
        first, operations = prompt[0], prompt[1:-1]
        assert response.endswith("<|im_end|>")
        assert len(demonstration.response_token_ids) == 1 + len(operations) // 2 * 3 + 1
        assert response[:3] == first + operations[:2]
        assert int(response[3]) == eval(first + operations[:2]) % 10  # the test's own digits and operators


def test_mistakes_are_the_same_in_every_run_of_a_seed() -> None:
    runs = [open_stream("arithmetic_chain", wrong_step_fraction=0.3).next_demonstrations(20) for _ in range(2)]

    assert runs[0] == runs[1]
    assert runs[0] != open_stream("arithmetic_chain").next_demonstrations(20)


def test_a_files_demonstration_is_its_worked_answer(tmp_path: Path) -> None:
    path = tmp_path / "gsm8k.jsonl"
    path.write_text(json.dumps({"question": "How many?", "answer": "40+32=72\n#### 72"}))

    (demonstration,) = open_stream(str(path)).next_demonstrations(1)

    assert bytes(demonstration.prompt_token_ids) == b"How many?"
    assert bytes(demonstration.response_token_ids[:-1]) == b"40+32=72\n#### 72"
    assert demonstration.response_token_ids[-1] == TOKENIZER.eos_token_id


def test_a_worked_answer_that_is_too_long_is_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    rows = [{"prompt": "p", "answer": "1" * 20}, {"prompt": "p", "answer": "2" * 19}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    stream = open_stream(str(path), max_response_tokens=20)

    assert {each.response_token_ids[0] for each in stream.next_demonstrations(6)} == {ord("2")}
    assert stream.num_too_long == 1
    with pytest.raises(UserError, match=r"worked answer of more than 5 \(rollout\.max_response_tokens\)"):
        open_stream(str(path), max_response_tokens=5).next_demonstrations(1)


def test_a_demonstrations_sample_has_neither_advantage_nor_behaviour_policy() -> None:
    (demonstration,) = open_stream("arithmetic_chain").next_demonstrations(1)
    sample = demonstration.sample(index=3)

    assert (sample.index, sample.advantage) == (3, 0.0)
    assert tuple(sample.prompt_token_ids) == demonstration.prompt_token_ids
    assert tuple(sample.response_token_ids) == demonstration.response_token_ids
    np.testing.assert_array_equal(sample.behaviour_log_probs, np.zeros(len(demonstration.response_token_ids)))
