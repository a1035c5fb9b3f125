"""Run directories with known numbers, as `train` would leave them: what reports are tested on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from megatron_gspo.config import dump_recipe, load_recipe
from megatron_gspo.report.read import RunRecord
from megatron_gspo.report.state import RunState
from megatron_gspo.routing.volatility import count_change
from megatron_gspo.routing.volatility_metrics import to_arrays

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny_gspo.yaml"
CLIP_RANGE = ("objective.clip_low=3e-4", "objective.clip_high=4e-4")  # `train` fills in the objective's own

Values = Mapping[str, float | Callable[[int], float | None] | None]

#: A healthy run, by step.
HEALTHY: Values = {
    "reward/mean": lambda step: 0.3 + 0.5 * min(1.0, step / 20) + 0.01 * (-1) ** step,
    "reward/solved_fraction": lambda step: 0.3 + 0.5 * min(1.0, step / 20),
    "groups/zero_variance_fraction": 0.1,
    "response/length_mean": 14.0,
    "response/truncated_fraction": 0.0,
    "clip/token_fraction": 0.15,
    "clip/sequence_fraction": 0.15,
    "clip/low_fraction": 0.1,
    "clip/high_fraction": 0.05,
    "ratio/token_log_std": 0.01,
    "ratio/sequence_log_std": 0.002,
    "ratio/token_abs_log_max": 0.2,
    "ratio/sequence_abs_log_max": 0.01,
    "ratio/effective_sample_fraction": 0.999,
    "ratio/token_log_std_changed": 0.02,
    "ratio/token_log_std_unchanged": 0.01,
    "ratio/token_routing_variance_share": 0.2,
    "ratio/token_replayed_variance_share": 0.7,
    "ratio/token_routing_covariance_share": 0.1,
    "entropy/mean": lambda step: 0.2 - 0.002 * min(step, 50),
    "grad_norm": lambda step: 0.2 + 0.02 * (step % 3),
    "lr": 2e-4,
    "mismatch/log_prob_abs_mean": 3e-7,
    "mismatch/kl": 5e-14,
    "mismatch/sequence_log_std": 1e-7,
    "routing/change_rate": 0.02,
    "routing/change_rate_after_update_1": 0.005,
    "routing/noise_floor": 0.0,
    "routing/noise_floor_repacked": 0.001,
    "routing/replayed_token_fraction": 0.0,
    "routing/bytes_per_token": 16.0,
    "time/rollout_s": 1.0,
    "time/update_s": 2.0,
    "time/step_s": 3.0,
    "throughput/tokens_per_s": 1000.0,
    "memory/peak_gib": 0.6,
    "tokens": 3000.0,
}


def metric_lines(
    steps: int, changes: Values | None = None, *, evaluate_every: int = 10, layers: int = 4
) -> list[dict[str, Any]]:
    """Lines of metrics of a healthy run, with some metrics changed (None: leaves the metric out)."""
    values = {**HEALTHY, **{f"routing/change_rate_layer_{layer}": 0.01 * layer for layer in range(1, layers + 1)}}
    values |= changes or {}
    lines: list[dict[str, Any]] = [{"step": 0, "policy_version": 0, "eval/arithmetic_chain/pass_at_1": 0.4}]
    for step in range(1, steps + 1):
        line: dict[str, Any] = {"step": step, "policy_version": step}
        line |= {name: value(step) if callable(value) else value for name, value in values.items() if value is not None}
        if step % evaluate_every == 0 or step == steps:
            line["eval/arithmetic_chain/pass_at_1"] = 0.4 + 0.4 * min(1.0, step / 20)
        lines.append(line)
    return lines


def write_run(
    path: Path,
    *overrides: str,
    steps: int = 30,
    planned: int | None = None,
    changes: Values | None = None,
    layers: int = 4,
    kept_every: int = 5,
) -> Path:
    """Write a run directory of `tiny_gspo.yaml` with recipe `overrides`, and volatility files every few steps."""
    path.mkdir(parents=True)
    planned_steps = f"training.steps={steps if planned is None else planned}"
    (path / "recipe.yaml").write_text(dump_recipe(load_recipe(RECIPE, [*CLIP_RANGE, planned_steps, *overrides])))
    environment = {"megatron_gspo": "0.1.0", "git_commit": "a" * 40, "num_ranks": 2, "packages": {"torch": "2.13.0"}}
    (path / "environment.json").write_text(json.dumps(environment | {"machine": {"num_gpus": 0, "num_cores": 2}}))
    lines = metric_lines(steps, changes, layers=layers)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "volatility").mkdir()
    for step in range(kept_every, steps + 1, kept_every):
        np.savez_compressed(path / "volatility" / f"step_{step}.npz", **volatility_arrays(layers))
    return path


def volatility_arrays(layers: int) -> dict[str, np.ndarray]:
    """64 tokens of one response, 2 of 8 experts each: in layer l the first 2 l tokens have one expert replaced.

    The change rate of layer l is therefore l / 64, all of it in the first sixteenths of the response; expert 7 gains 2 l
    tokens and expert 1 loses them; changed tokens have margin 0.001, the others 0.1.
    """
    old = torch.tensor([0, 1], dtype=torch.int16).repeat(64, layers, 1)
    new, margins = old.clone(), torch.full((64, layers), 0.1)
    for layer in range(layers):
        new[: 2 * (layer + 1), layer, 1] = 7
        margins[: 2 * (layer + 1), layer] = 0.001
    arrays = {}
    for name, routes in (("change_rate", new), ("change_rate_after_update_1", old.clone())):
        counts = count_change(
            old,
            routes,
            num_experts=8,
            layers=range(1, layers + 1),
            positions=torch.arange(64) / 64,
            old_margin=margins if name == "change_rate" else None,
        )
        arrays |= {f"{name}/{part}": array for part, array in to_arrays(counts).items()}
    return arrays


def record(*, steps: int = 40, changes: Values | None = None, recipe: Mapping[str, Any] | None = None) -> RunRecord:
    """A healthy run in memory, with metrics and fields of the recipe (by dotted path) changed."""
    fields: dict[str, Any] = {
        "objective": {"name": "gspo", "clip_low": 3e-4, "clip_high": 4e-4},
        "routing": {"replay": "off"},
        "rollout": {"old_log_probs": "trainer"},
        "training": {"mini_batches": 4, "steps": steps},
    }
    for dotted, value in (recipe or {}).items():
        section, _, name = dotted.partition(".")
        fields[section] = fields[section] | {name: value}
    state = RunState("finished", "")
    return RunRecord(
        Path("run"), yaml.safe_load(yaml.safe_dump(fields)), {}, metric_lines(steps, changes), False, state
    )
