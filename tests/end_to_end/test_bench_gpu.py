"""The GPU's bench: its lines run at tiny shapes, and its comparison with the CPU accepts rounding and nothing else.

These tests compute on CUDA where it is there.
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_gspo import parallel
from tools.bench import gpu_same
from tools.bench.gpu_log_probs import LIGER_VERSION, TINY, Problem, hold_against_exact, naive, ours
from tools.bench.gpu_same import TOKENS, check, compute, difference, differences
from tools.bench.gpu_step import (
    Measured,
    Operations,
    build,
    mfu,
    mini_batch,
    step_operations,
    tiny_shapes,
    write_recipe,
)

ROOT = Path(__file__).parents[2]


def test_tiny_runs_every_part_and_reports_no_time():
    command = [sys.executable, "tools/bench/gpu.py", "--tiny", "--steps", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    same, *log_probs = done.stdout.splitlines()[:4]
    assert same.startswith("A tiny bfloat16 model here beside the CPU's: log-probs ")
    assert [line.partition(":")[0].strip() for line in log_probs[1:]] == ["ours", "ours, log-prob alone"]
    for part in ("  naive: values within", "256 packed tokens, 2 layers", "time by operator: ", "bash tools/test.sh"):
        assert part in done.stdout
    assert "tokens/s" not in done.stdout and "MFU" not in done.stdout
    if not torch.cuda.is_available():
        assert "Liger is left out" in done.stdout and " ms" not in done.stdout


def test_the_comparison_accepts_rounding_and_refuses_another_model(monkeypatch: pytest.MonkeyPatch):
    expected = compute(None)
    check(differences(compute(expected, dtype="float32"), expected))

    def set_other_weights(model: torch.nn.Module) -> None:
        set_weights(model)
        with torch.no_grad():
            dict(model.named_parameters())["decoder.layers.1.self_attention.linear_proj.weight"].mul_(0.9)

    set_weights = gpu_same.set_weights
    monkeypatch.setattr(gpu_same, "set_weights", set_other_weights)
    with pytest.raises(AssertionError, match="log-probs: "):
        check(differences(compute(expected), expected))


def test_a_gradient_where_none_should_be_and_one_that_is_no_number_are_refused():
    nothing, something = torch.zeros(3), torch.tensor([0.0, 1e-9, 0.0])
    assert difference(nothing, nothing) == 0
    assert difference(something, nothing) == math.inf
    for wrong in (math.inf, math.nan):
        with pytest.raises(AssertionError, match="gradient of the router"):
            check({"gradient of the router": wrong})


def test_another_log_prob_or_gradient_is_refused():
    problem = Problem.of(TINY, TINY.checked_tokens)
    hold_against_exact(ours, problem)
    with pytest.raises(AssertionError, match="log-prob and entropy differ"):
        hold_against_exact(lambda hidden, weight, targets: naive(hidden, weight, targets.roll(1)), problem)
    with pytest.raises(AssertionError, match="gradients differ"):
        hold_against_exact(
            lambda hidden, weight, targets: naive(hidden, weight.detach() * 1 + 0 * weight, targets), problem
        )


def test_operations_count_the_output_layer_for_response_tokens_alone(tmp_path: Path):
    recipe = write_recipe(tmp_path, tiny_shapes() | {"num_hidden_layers": 2}, TOKENS)
    policy = build(recipe)
    operations = step_operations(policy, mini_batch(recipe, TOKENS))
    parallel.shutdown()
    # Hidden size 64; 4 heads and 2 key-value heads of 16; 2 of 8 experts of 32; 4 segments of 64 tokens, 16 a prompt's.
    attention, experts = 64 * (64 + 2 * 32) + 64 * 64, 64 * 8 + 2 * 3 * 64 * 32
    pairs = 4 * 64**2 / 2
    assert operations.layers == 6 * 256 * 2 * (attention + experts) + 12 * 2 * 64 * pairs
    assert operations.output_layer == 6 * 4 * 48 * 512 * 64


def test_mfu_is_given_with_and_without_the_output_layer_beside_what_the_published_one_is_of():
    measured = Measured(16_384, [1.0], Operations(300e12, 95.6e12), 0.0, [])
    line = mfu(measured, 1.0, "NVIDIA H200")
    assert line.startswith("MFU 40.0%; 30.3% without")
    assert line.endswith("2.8% for all 48 layers on 8 H200, communication included")
    assert "no peak is listed" in mfu(measured, 1.0, "another")


def test_the_peers_environment_gets_the_liger_that_is_meant():
    assert f"liger-kernel=={LIGER_VERSION}\n" in (ROOT / "tools/bench/install_peers.sh").read_text()
