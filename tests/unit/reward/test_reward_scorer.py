"""Scoring through the real worker process: whatever a reward does, the run goes on and the failure is counted."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_gspo.reward import RewardScorer, ScoringItem
from megatron_gspo.types import Prompt, UserError

REWARDS_OF_A_USER = '''
import os, signal, subprocess, sys, time
from pathlib import Path
import numpy as np

def length(prompt, response_text, finished):
    return len(response_text) / len(prompt.answer)

def as_told(prompt, response_text, finished):
    """Does what the response says."""
    match response_text:
        case "hang": time.sleep(60)
        case "hang in C": sum(range(10**12))
        case "raise": raise RuntimeError("the judge is out")
        case "exit": os._exit(3)
        case "sys.exit": sys.exit(4)
        case "print":
            print("a line on standard output")
            print('{"reward": 0.125}', flush=True)
            os.write(1, b"raw bytes")
            subprocess.run(["echo", "from a child"], check=True)
        case "read": return float(sys.stdin.read() == "")
        case "nan": return float("nan")
        case "infinite": return float("inf")
        case "beyond float32": return 1e300
        case "none": return None
        case "text": return "1.0"
        case "numpy": return np.float32(0.25)
        case "bool": return True
        case "torch": return float("torch" in sys.modules or "transformers" in sys.modules)
        case "row": return float(prompt.metadata["row"]["weight"])
        case "negative": return -2.0
        case "child": subprocess.Popen(["sleep", "321.25"]); time.sleep(60)
        case "pid": return float(os.getpid())
        case "asked to stop":
            for number in (signal.SIGUSR1, signal.SIGTERM):
                os.kill(os.getpid(), number)
    return 0.5

def meet(prompt, response_text, finished):
    """Waits until four calls of it have begun. The response is a file of the call's own, named by a number."""
    mine = Path(response_text)
    mine.touch()
    while len(list(mine.parent.iterdir())) < 4:
        time.sleep(0.01)
    return int(mine.name) / 4

not_a_function = 3
'''


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "rewards_of_a_user.py").write_text(REWARDS_OF_A_USER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "rewards_of_a_user"


@pytest.fixture
def open_scorer() -> Iterator[Callable[..., RewardScorer]]:
    opened: list[RewardScorer] = []

    def open_one(name: str, timeout_s: float = 5.0, num_workers: int = 1) -> RewardScorer:
        opened.append(RewardScorer(name, timeout_s, num_workers))
        return opened[-1]

    yield open_one
    for scorer in opened:
        scorer.close()


@pytest.fixture
def as_told(user_module: str, open_scorer: Callable[..., RewardScorer]) -> RewardScorer:
    return open_scorer(f"{user_module}:as_told", timeout_s=0.5)


def item(response_text: str, *, reward: str = "math", answer: str = "72", finished: bool = True) -> ScoringItem:
    metadata = {"reward": reward, "row": {"weight": 0.75}}
    return ScoringItem(Prompt("p:1", (1, 2), "?", answer, metadata), response_text, finished)


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ("hang", "took longer than 0.5 s"),
        ("hang in C", "took longer than 0.5 s"),
        ("raise", "RuntimeError: the judge is out"),
        ("exit", "ended its process with exit status 3"),
        ("sys.exit", "ended its process with exit status 4"),
        ("nan", "ValueError: the reward returned nan; a finite float32 is accepted"),
        ("infinite", "ValueError: the reward returned inf; a finite float32 is accepted"),
        ("beyond float32", "ValueError: the reward returned 1e+300; a finite float32 is accepted"),
        ("none", "TypeError: the reward returned a NoneType; a number is accepted"),
        ("text", "TypeError: the reward returned a str; a number is accepted"),
    ],
)
def test_a_reward_that_fails_scores_0_and_is_counted_and_logged(
    told: str, reason: str, as_told: RewardScorer, caplog: pytest.LogCaptureFixture
) -> None:
    scored = as_told.score([item("fine"), item(told), item("fine")])

    np.testing.assert_array_equal(scored.rewards, np.float32([0.5, 0.0, 0.5]))
    assert scored.rewards.dtype == np.float32
    assert scored.num_failed == 1
    assert scored.reasons == {1: reason}
    assert f"failed for 1 of 3 responses, which score 0; the first, to p:1: {reason}" in caplog.text


@pytest.mark.parametrize(
    ("told", "reward"),
    [
        ("print", 0.5),
        ("read", 1.0),
        ("numpy", 0.25),
        ("bool", 1.0),
        ("row", 0.75),
        ("torch", 0.0),
        ("asked to stop", 0.5),  # as SLURM asks every process of a job, and means the trainer
    ],
)
def test_what_a_reward_may_do(
    told: str, reward: float, user_module: str, open_scorer: Callable[..., RewardScorer]
) -> None:
    scored = open_scorer(f"{user_module}:as_told").score([item(told), item("fine")])

    np.testing.assert_array_equal(scored.rewards, np.float32([reward, 0.5]))
    assert scored.num_failed == 0


def test_the_worker_is_started_once_and_again_only_after_a_failure(as_told: RewardScorer) -> None:
    first, second = (as_told.score([item("pid")]).rewards[0] for _ in range(2))
    as_told.score([item("raise")])
    third = as_told.score([item("pid")]).rewards[0]
    as_told.score([item("hang")])
    fourth = as_told.score([item("pid")]).rewards[0]

    assert first == second == third != fourth


def test_a_hanging_reward_takes_what_it_started_with_it(as_told: RewardScorer) -> None:
    assert as_told.score([item("child")]).num_failed == 1

    deadline = time.monotonic() + 60  # a process that was killed ends when the kernel gets to it
    while is_running(b"sleep\x00321.25\x00"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(command: bytes) -> bool:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended since
            if (process / "cmdline").read_bytes() == command:
                return True
    return False


def test_closing_ends_the_workers(user_module: str) -> None:
    scorer = RewardScorer(f"{user_module}:as_told", 5.0, 2)
    pid = int(scorer.score([item("pid")]).rewards[0])
    assert Path(f"/proc/{pid}").exists()

    scorer.close()

    assert not Path(f"/proc/{pid}").exists()


def test_workers_score_at_the_same_time_and_keep_the_order(
    user_module: str, open_scorer: Callable[..., RewardScorer], tmp_path: Path
) -> None:
    """No call returns before all four have begun: one after another, the first would run out of time."""
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    # The first of the four waits for the last one's process to start and import the reward.
    scorer = open_scorer(f"{user_module}:meet", timeout_s=60.0, num_workers=4)

    scored = scorer.score([item(str(meeting / str(number))) for number in range(4)])

    assert scored.num_failed == 0
    np.testing.assert_array_equal(scored.rewards, np.float32([0, 0.25, 0.5, 0.75]))


def test_workers_keep_the_order_where_some_hang(user_module: str, open_scorer: Callable[..., RewardScorer]) -> None:
    scorer = open_scorer(f"{user_module}:as_told", timeout_s=1.0, num_workers=4)

    scored = scorer.score([item("hang"), item("numpy"), item("hang"), item("bool"), item("hang"), item("fine")])

    np.testing.assert_array_equal(scored.rewards, np.float32([0, 0.25, 0, 1, 0, 0.5]))
    assert set(scored.reasons) == {0, 2, 4}


def test_a_reward_outside_0_to_1_is_used_and_warned_of_once(
    as_told: RewardScorer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        scored = [as_told.score([item("negative"), item("fine")]) for _ in range(2)]

    assert [batch.rewards.tolist() for batch in scored] == [[-2.0, 0.5]] * 2
    assert caplog.text.count("A reward of -2 was given") == 1


def test_task_asks_each_problem_for_its_reward(open_scorer: Callable[..., RewardScorer]) -> None:
    scored = open_scorer("task").score(
        [
            item("3+4=7", reward="exact", answer="7"),
            item("3+4=8", reward="exact", answer="7"),
            item("3+47", reward="last_digit", answer="7"),
            item("3+48", reward="last_digit", answer="7"),
            item("", reward="last_digit", answer="7"),
            item(r"\boxed{1,080}", reward="math", answer="1080"),
            item("#### 1081", reward="math", answer="1080"),
            item("72", reward="math", answer=r"\boxed{}"),
        ]
    )

    assert scored.rewards.tolist() == [1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    assert list(scored.reasons) == [7]


def test_exact_needs_no_worker_process(
    open_scorer: Callable[..., RewardScorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/there/is/no/python")

    assert open_scorer("exact").score([item("=72"), item("=72", finished=False)]).rewards.tolist() == [1.0, 0.0]


def test_no_responses_score_as_an_empty_batch(open_scorer: Callable[..., RewardScorer]) -> None:
    scored = open_scorer("exact").score([])

    assert (scored.rewards.shape, scored.num_failed) == ((0,), 0)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("exakt", r"reward\.name is 'exakt' .did you mean 'exact'\?.; accepted: task, exact, last_digit, math"),
        ("no_such_module:reward", r"reward\.name: 'no_such_module:reward' cannot be imported"),
        ("rewards_of_a_user:missing", r"reward\.name: .* has no attribute 'missing'"),
        ("rewards_of_a_user:not_a_function", r"reward\.name: .* is not a function"),
        ("breaks_on_import:reward", r"reward\.name: .* cannot be imported: ZeroDivisionError"),
    ],
)
def test_a_reward_that_does_not_exist_is_refused_at_once(
    name: str, said: str, user_module: str, tmp_path: Path
) -> None:
    (tmp_path / "breaks_on_import.py").write_text("1 / 0")

    with pytest.raises(UserError, match=said):
        RewardScorer(name, 1.0)
