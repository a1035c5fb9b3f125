"""What a person sees: the metrics that matter, and a time that is left."""

import io

from rich.console import Console

from megatron_gspo.training.display import Display, describe, duration


def test_a_step_is_described_by_reward_clip_fraction_and_speed():
    text = describe({"reward/mean": 0.5, "clip/token_fraction": 0.153, "throughput/tokens_per_s": 2345.6, "other": 1})
    assert text == "reward 0.500  clipped 15.30%  tokens/s 2,346"


def test_durations_read_as_people_say_them():
    assert [duration(s) for s in (4.4, 200, 7500)] == ["4s", "3m20s", "2h05m"]


def test_off_a_terminal_every_step_is_a_plain_line_with_the_time_left():
    out = io.StringIO()
    display = Display("step", 3, console=Console(file=out, width=200))
    display.start(["gspo on a task"])
    for step in (1, 2, 3):
        display.show({"step": step, "reward/mean": step / 10})
    display.stop()
    lines = out.getvalue().splitlines()
    assert lines[0] == "gspo on a task"
    assert lines[1].startswith("step 1/3  reward 0.100  about ")
    assert lines[2].endswith(" left")
    assert lines[3] == "step 3/3  reward 0.300"


def test_ranks_that_are_not_the_first_show_nothing():
    out = io.StringIO()
    display = Display("step", 3, enabled=False, console=Console(file=out))
    display.start(["details"])
    display.show({"step": 1, "reward/mean": 0.1})
    display.stop()
    assert out.getvalue() == ""
