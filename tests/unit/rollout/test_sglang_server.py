"""How SGLang servers are started, without starting one: nothing secret in sight, nothing open to others."""

from __future__ import annotations

import logging
import stat
import sys
from pathlib import Path

import pytest

from megatron_gspo.config import SglangSection, load_recipe
from megatron_gspo.config.sglang import EXTRA_FLAGS
from megatron_gspo.rollout import sglang_launcher, sglang_server
from megatron_gspo.rollout.sglang import ServerHost
from megatron_gspo.rollout.sglang_server import (
    ServerModel,
    SglangServers,
    find_python,
    launch_command,
    read_key,
    server_environment,
    write_key,
)
from megatron_gspo.types import UserError
from tests.tiny_model import tiny_recipe, write_tiny_model

MODEL = ServerModel(Path("/models/policy"), "bfloat16", on_cpu=True, return_routed_experts=True)
GPU_MODEL = ServerModel(Path("/models/policy"), "bfloat16", on_cpu=False, return_routed_experts=False)


def command(section: SglangSection, model: ServerModel = MODEL, index: int = 0) -> list[str]:
    return launch_command(Path("/sglang/bin/python"), Path("/private/key"), section, model, index, 30000)


def value_of(flag: str, words: list[str]) -> str:
    return words[words.index(flag) + 1]


def test_the_command_names_the_keys_file_and_one_private_address(tmp_path: Path):
    file = write_key(tmp_path)
    words = launch_command(Path("python"), file, SglangSection(), MODEL, 0, 30000)
    assert value_of("--host", words) == "127.0.0.1"
    assert str(file) in words
    assert not any(read_key(file) in word for word in words)
    assert "--api-key" not in words


def test_neither_code_nor_adapters_nor_other_modalities_are_asked_for():
    words = command(SglangSection(extra_flags="--disable-radix-cache"))
    refused = ("trust-remote-code", "lora", "multimodal", "disaggregation", "custom", "grpc", "plugin", "tool")
    for word in (*words, *EXTRA_FLAGS):
        assert not any(part in word for part in refused)
    assert "--skip-tokenizer-init" in words


def test_on_the_cpu_sglang_takes_torchs_own_attention_and_a_bounded_cache():
    words = command(SglangSection())
    assert (value_of("--device", words), value_of("--attention-backend", words)) == ("cpu", "torch_native")
    assert int(value_of("--max-total-tokens", words)) > 0
    assert "--sleep-on-idle" in words
    assert "--enable-return-routed-experts" in words
    assert server_environment(on_cpu=True)["SGLANG_USE_CPU_ENGINE"] == "1"


def test_servers_on_gpus_follow_each_other_after_the_first():
    section = SglangSection(num_servers=2, tensor_parallel=2, first_gpu=4)
    words = command(section, GPU_MODEL, index=1)
    assert (value_of("--device", words), value_of("--tp-size", words)) == ("cuda", "2")
    assert value_of("--base-gpu-id", words) == "6"
    assert "--max-total-tokens" not in words
    assert "--sleep-on-idle" not in words
    assert "--enable-return-routed-experts" not in words
    assert "SGLANG_USE_CPU_ENGINE" not in server_environment(on_cpu=False)


def test_servers_that_share_gpus_with_the_trainer_can_give_back_memory():
    section = SglangSection(release_memory=True)
    assert "--enable-memory-saver" in command(section, GPU_MODEL)
    assert "--enable-memory-saver" not in command(SglangSection(), GPU_MODEL)
    assert "--enable-memory-saver" not in command(section)  # the package is made for CUDA


def test_gloo_listens_where_the_server_does(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert server_environment(on_cpu=True, host="127.0.0.1")["GLOO_SOCKET_IFNAME"] == "lo"
    assert "GLOO_SOCKET_IFNAME" not in server_environment(on_cpu=True, host="10.0.0.5")


def test_servers_compute_in_the_models_dtype_unless_told_otherwise():
    assert value_of("--dtype", command(SglangSection())) == "bfloat16"
    assert value_of("--dtype", command(SglangSection(dtype="float32"))) == "float32"


def test_a_rank_does_not_pass_its_place_on_to_a_server(monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "PYTHONPATH", "SGLANG_USE_CPU_ENGINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PATH", "/bin")
    kept = server_environment(on_cpu=False)
    assert kept["PATH"] == "/bin"
    assert not {
        name for name in kept if name.startswith(("RANK", "WORLD", "MASTER", "TORCHELASTIC", "PYTHONPATH", "SGLANG"))
    }


def test_keys_differ_and_only_their_owner_reads_them(tmp_path: Path):
    (tmp_path / "other").mkdir()
    one, other = write_key(tmp_path), write_key(tmp_path / "other")
    assert stat.S_IMODE(one.stat().st_mode) == 0o600
    assert len(read_key(one)) >= 32
    assert read_key(one) != read_key(other)


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [("key\n", 0o640, "mode 640.*accepted: 600"), ("", 0o600, "holds no key"), ("two words", 0o600, "holds no key")],
)
def test_a_key_file_that_is_none_is_refused(content: str, mode: int, words: str, tmp_path: Path):
    file = tmp_path / "key"
    file.write_text(content)
    file.chmod(mode)
    with pytest.raises(UserError, match=rf"rollout\.sglang\.key_file: .*{words}"):
        read_key(file)


def test_a_key_file_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"rollout\.sglang\.key_file: .*cannot be read"):
        read_key(tmp_path / "nowhere")


def test_sglangs_python_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MEGATRON_GSPO_SGLANG_PYTHON", "/nowhere/python")
    with pytest.raises(UserError, match=r"\$MEGATRON_GSPO_SGLANG_PYTHON is /nowhere/python.*install_sglang_cpu\.sh"):
        find_python(SglangSection())
    with pytest.raises(UserError, match=r"rollout\.sglang\.python is /elsewhere/python"):
        find_python(SglangSection(python=Path("/elsewhere/python")))


def servers_run_by(python: str, directory: Path, **fields: object) -> SglangServers:
    section = SglangSection(python=python, num_servers=2, **fields)
    return SglangServers(section, GPU_MODEL, directory)


def test_a_server_that_does_not_come_up_is_refused_with_its_own_last_lines(tmp_path: Path):
    servers = servers_run_by(sys.executable, tmp_path)  # the trainer's Python, which has no SGLang
    with pytest.raises(
        UserError, match=r"(?s)server \d ended with status 1 .* last lines were.*No module named 'sglang'"
    ):
        servers.start()
    assert not servers.process_ids()


def test_servers_are_waited_for_with_progress_until_the_time_limit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sglang_server, "PROGRESS_EVERY_S", 0.1)
    launcher = tmp_path / "launcher.py"
    launcher.write_text("import time; print('loading for ever', flush=True); time.sleep(600)")
    monkeypatch.setattr(sglang_server, "LAUNCHER", launcher)
    servers = servers_run_by(sys.executable, tmp_path, startup_timeout_s=1.5)
    words = r"(?s)did not come up within rollout.sglang.startup_timeout_s \(1.5 s\); .*loading for ever"
    with caplog.at_level(logging.INFO), pytest.raises(UserError, match=words):
        servers.start()
    assert "waiting for SGLang: 0 of 2 servers up after 1 s" in caplog.text
    assert not servers.process_ids()


def test_what_is_logged_has_no_key_in_it(caplog: pytest.LogCaptureFixture):
    make_record = logging.getLogRecordFactory()
    try:
        sglang_launcher.keep_out_of_log("s3cret-key")
        logging.getLogger("sglang").warning("server_args=%s", {"api_key": "s3cret-key", "port": 1})
        logging.getLogger("sglang").warning("all is well")
    finally:
        logging.setLogRecordFactory(make_record)
    assert "s3cret-key" not in caplog.text
    assert "'port': 1" in caplog.text
    assert "all is well" in caplog.text


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": None}, r"names no architectures.*Qwen3MoeForCausalLM"),
        ({"mlp_only_layers": [1]}, r"makes layers \[1\] dense"),
    ],
)
def test_a_model_that_sglang_would_not_serve_as_it_is_is_refused(config: dict[str, object], words: str, tmp_path: Path):
    model = write_tiny_model(tmp_path / "model", **({"architectures": ["Qwen3MoeForCausalLM"]} | config))
    (tmp_path / "recipe.yaml").write_text(tiny_recipe(model, rollout={"engine": "sglang", "max_response_tokens": 12}))
    with pytest.raises(UserError, match=rf"model\.path: .*{words}"):
        ServerHost(load_recipe(tmp_path / "recipe.yaml"), on_cpu=True)
