"""`rollout.sglang`: where servers may listen, what running ones need, and which of SGLang's flags pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_gspo.config import Recipe

ENGINE = "rollout.engine=sglang"
SERVERS = "rollout.sglang.urls=http://127.0.0.1:30000, http://localhost:30001/"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["rollout.sglang.host=0.0.0.0"], ["rollout.sglang.host is the text '0.0.0.0'", "a private address"]),
        (["rollout.sglang.host=8.8.8.8"], ["rollout.sglang.host is the text '8.8.8.8'", "a private address"]),
        (["rollout.sglang.host=node1"], ["rollout.sglang.host is the text 'node1'", "a private address"]),
        (["rollout.sglang.first_port=80"], ["rollout.sglang.first_port is 80", "at least 1024"]),
        (["rollout.sglang.extra_flags=--trust-remote-code"], ["extra_flags has --trust-remote-code", "--page-size"]),
        (["rollout.sglang.extra_flags=--enable-lora"], ["extra_flags has --enable-lora"]),
        (["rollout.sglang.extra_flags=--page-size=2 --host=0.0.0.0"], ["extra_flags has --host"]),
        (["rollout.sglang.extra_flags=--pagesize=2"], ["extra_flags has --pagesize", "nearest name: --page-size"]),
        (["rollout.sglang.extra_flags=--page-size 2 30"], ["extra_flags has 30", "--flag=value"]),
        (["rollout.sglang.key_file=key"], ["rollout.sglang.key_file is the text", "a random key of their own"]),
        ([SERVERS], ["rollout.sglang.key_file is null", "mode 0600"]),
        (
            ["rollout.sglang.urls=10.0.0.5:30000"],
            ["rollout.sglang.urls is the text '10.0.0.5:30000'", "http://HOST:PORT"],
        ),
        (["rollout.sglang.urls=,"], ["rollout.sglang.urls is the text ','", "http://HOST:PORT"]),
        (
            ["rollout.sglang.urls=http://10.0.0.5:30000", "rollout.sglang.key_file=key"],
            ["rollout.sglang.weights_dir is null", "http://10.0.0.5:30000 is on another machine", "broadcast"],
        ),
        (
            ["rollout.sglang.weight_transport=broadcast", "rollout.sglang.weights_dir=weights"],
            ["rollout.sglang.weights_dir is the text", "null under rollout.sglang.weight_transport: broadcast"],
        ),
        (["rollout.sglang.weight_transport=file"], ["rollout.sglang.weight_transport is the text 'file'"]),
    ],
)
def test_what_cannot_be_served_is_refused(
    overrides: list[str], told: list[str], recipe_file: Callable[..., Path], refusal: Callable[..., str]
) -> None:
    message = refusal(recipe_file(), [ENGINE, *overrides])
    assert all(part in message for part in told), message


def test_running_servers_are_listed_and_paths_are_made_absolute(load: Callable[..., Recipe]) -> None:
    section = load(
        ENGINE, SERVERS, "rollout.sglang.key_file=key", "rollout.sglang.python=venv/bin/python"
    ).rollout.sglang
    assert section.server_urls() == ["http://127.0.0.1:30000", "http://localhost:30001"]
    assert section.key_file == Path("key").absolute()
    assert section.python == Path("venv/bin/python").absolute()


def test_a_python_that_is_a_link_stays_one(load: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "python").symlink_to("/usr/bin/env")
    assert load(ENGINE, f"rollout.sglang.python={tmp_path / 'python'}").rollout.sglang.python == tmp_path / "python"


def test_flags_that_tune_speed_and_memory_pass(load: Callable[..., Recipe]) -> None:
    flags = "--chunked-prefill-size=4096 --disable-radix-cache"
    assert load(ENGINE, f"rollout.sglang.extra_flags={flags}").rollout.sglang.extra_flags == flags


def test_the_local_engine_has_no_server_to_verify(
    recipe_file: Callable[..., Path], refusal: Callable[..., str]
) -> None:
    assert "rollout.verify_weights is true; accepted: false" in refusal(recipe_file(), ["rollout.verify_weights=true"])


def test_only_the_local_engine_has_a_number_format_here(
    recipe_file: Callable[..., Path], refusal: Callable[..., str], load: Callable[..., Recipe]
) -> None:
    assert load("rollout.dtype=bfloat16").rollout.dtype == "bfloat16"
    told = refusal(recipe_file(), [ENGINE, "rollout.dtype=bfloat16"])
    assert "rollout.dtype is the text 'bfloat16'" in told
    assert "rollout.sglang.dtype" in told
