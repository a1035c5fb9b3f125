"""A tiny bfloat16 model here beside the same one on the CPU: log-probs, entropies, loss and gradients.

In: nothing; weights, tokens and advantages are made from fixed seeds. Out: a line that says how far the two are apart,
or an error.

A process that sees no GPU computes first and writes down what it found, with the experts its routers chose. Here those
routes are replayed (`routing/tap.py`): two experts whose scores are equal to within rounding may come in either order,
and one token sent elsewhere would change gradients by more than all rounding does. The loss and its gradients are
taken against an old policy made from the CPU's log-probs (`old_policy`), the same on both sides, so that ratios are
not 1 and say what this model computed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_gspo import parallel
from megatron_gspo.model.policy import TokenLogProbs
from megatron_gspo.routing.record import MicroBatchRoutes
from megatron_gspo.routing.tap import RoutingTaps
from megatron_gspo.training.forward import run_micro_batches
from megatron_gspo.types import MicroBatch
from tools.bench.gpu_step import build, mini_batch, tiny_shapes, update, write_recipe

TOKENS = 256
#: |log s| of every response: far from 0 beside what rounding does to a mean of log-probs, and beside GSPO's clip range,
#: so that no ratio is clipped on one side alone.
SHIFT = 0.1
#: About three times what this model in bfloat16 and in float32 are apart on a CPU with the same routes (0.8%, 1.7%; of
#: gradients 3.0% in the parameter that differs most, 1.6% in most), and more of sums in which rounding cancels (0.05%).
TOLERANCES = {"log-probs": 0.025, "entropies": 0.05, "loss": 0.005, "gradient norm": 0.005}
GRADIENT_TOLERANCE = 0.08


def compare_with_cpu() -> None:
    """Hold what a tiny model computes here against what it computes in a process that sees no GPU.

    Raises:
        AssertionError: they differ by more than bfloat16 rounds off.
    """
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "cpu.pt"
        command = [sys.executable, str(Path(__file__).with_name("gpu.py")), "--write-cpu", str(file)]
        subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, check=True)
        expected = torch.load(file, weights_only=True)
    found = compute(expected)
    apart = differences(found, expected)
    check(apart)
    routes = zip(found["own_routes"], expected["own_routes"], strict=True)
    elsewhere = sum(int((here.sort(-1)[0] != cpu.sort(-1)[0]).any(-1).sum()) for here, cpu in routes)
    of_gradients = max(value for name, value in apart.items() if name.startswith("gradient of "))
    print(
        "A tiny bfloat16 model here beside the CPU's: "
        + ", ".join(f"{name} {apart[name]:.2%}" for name in ("log-probs", "entropies", "loss", "gradient norm"))
        + f", the parameter whose gradient differs most {of_gradients:.2%} "
        f"(routes replayed; in {elsewhere} places a token's experts would have been others)"
    )


def compute(given: Mapping[str, Any] | None, *, dtype: str = "bfloat16") -> dict[str, Any]:
    """What the tiny model computes on this process's device.

    Args:
        given: what this function returned elsewhere: its routes are replayed, and its log-probs make the old policy.
            None lets the routers choose.

    Returns:
        On the host: `log_probs` and `entropies` ([T] float32 a micro-batch), `routes` taken and `own_routes` that the
        routers chose or would have ([layers, S, K] a micro-batch), `loss` and `gradient norm`, and `gradients` by
        parameter.
    """
    with tempfile.TemporaryDirectory() as directory:
        recipe = write_recipe(Path(directory), tiny_shapes() | {"num_hidden_layers": 2}, TOKENS, dtype=dtype)
        policy = build(recipe)
    set_weights(policy.models[0])
    batch = mini_batch(recipe, TOKENS)
    micro_batches = batch.micro_batches
    taps = RoutingTaps(policy.models)
    if given is None:
        pass_through = taps.record(micro_batches)
    else:
        routes = [MicroBatchRoutes(by_layer) for by_layer in given["routes"]]
        pass_through = taps.replay(routes, micro_batches, note_natural=True)

    def keep(position: int, micro_batch: MicroBatch, output: TokenLogProbs) -> tuple[Tensor, TokenLogProbs]:
        del position, micro_batch
        return output.log_probs.sum(), output

    with pass_through as session:
        outputs = run_micro_batches(
            policy.chunks, micro_batches, keep, temperature=1.0, with_entropy=True, forward_only=True
        )
    own_routes = [routes.by_layer.cpu() for routes in session.natural_routes]
    log_probs = [output.log_probs.cpu() for output in outputs]
    taken, of_cpu = (own_routes, log_probs) if given is None else (given["routes"], given["log_probs"])
    old = [old_policy(micro_batch, values) for micro_batch, values in zip(micro_batches, of_cpu, strict=True)]
    # The backward pass takes the routes of the forward pass above on either side.
    replayed = taps.replay([MicroBatchRoutes(by_layer) for by_layer in taken], micro_batches)
    totals = update(policy, recipe, batch, old, replayed)
    found = {
        "log_probs": log_probs,
        "entropies": [output.entropy.cpu() for output in outputs if output.entropy is not None],
        "routes": taken,
        "own_routes": own_routes,
        "loss": torch.tensor(totals.sums["loss/policy"][0]),
        "gradient norm": torch.tensor(totals.sums["grad_norm"][0]),
        "gradients": {name: weight.main_grad.float().cpu() for name, weight in policy.models[0].named_parameters()},
    }
    parallel.shutdown()
    return found


def set_weights(model: torch.nn.Module) -> None:
    """The same weights on every machine: matrices from one generator, such that logits spread by about 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                values = torch.randn(parameter.shape, generator=generator) * 0.125
                parameter.copy_(values.to(torch.bfloat16).to(parameter.device, parameter.dtype))


def old_policy(micro_batch: MicroBatch, log_probs: Tensor) -> Tensor:
    """Log-probs [T] of an old policy, from those of the policy: noise on every token, and a shift along each response.

    Every ratio comes to e^±`SHIFT`, on the side of 1 where its response learns, but for the last response, which is
    clipped and owes no gradient.
    """
    bounds = micro_batch.response_cu_seqlens.cpu()
    towards = micro_batch.advantages.cpu().sign()
    towards[-1] *= -1
    noise = torch.randn(log_probs.shape, generator=torch.Generator().manual_seed(1)) * SHIFT
    shifted = log_probs + noise
    for response, (start, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        shifted[start:end] += SHIFT * towards[response] - noise[start:end].mean()
    return shifted.to(micro_batch.advantages.device)


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, float]:
    """How far two results of `compute` are apart, as shares: of gradients and loss as they are, of log-probs and
    entropies in how they vary over tokens, since all are near the logarithm of the vocabulary."""
    apart = {}
    for key, name in (("log_probs", "log-probs"), ("entropies", "entropies")):
        here, there = torch.cat(found[key]), torch.cat(expected[key])
        apart[name] = difference(here - there.mean(), there - there.mean())
    for name in ("loss", "gradient norm"):
        apart[name] = difference(found[name], expected[name])
    assert found["gradients"].keys() == expected["gradients"].keys(), "the models have the same parameters"
    for name, gradient in expected["gradients"].items():
        apart[f"gradient of {name}"] = difference(found["gradients"][name], gradient)
    return apart


def difference(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of what is expected: infinite where nothing should be and something is."""
    assert found.shape == expected.shape, "both are of one thing"
    norm, apart = float(expected.double().norm()), float((found.double() - expected.double()).norm())
    if norm == 0.0:
        return 0.0 if apart == 0.0 else float("inf")
    return apart / norm


def check(apart: Mapping[str, float]) -> None:
    """Refuse what rounding does not explain.

    Raises:
        AssertionError: something is further apart than its tolerance, or not a number.
    """
    allowed = {name: TOLERANCES.get(name, GRADIENT_TOLERANCE) for name in apart}
    wrong = [
        f"{name}: {value:.2%} (rounding explains {allowed[name]:.1%})"
        for name, value in apart.items()
        if not value <= allowed[name]  # of a NaN too
    ]
    assert not wrong, f"this device does not compute what the CPU does: {', '.join(wrong)}"


def write_cpu(file: Path) -> None:
    """What the tiny model computes here, to `file`."""
    torch.save(compute(None), file)
