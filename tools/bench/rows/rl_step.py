"""A whole step of GSPO beside TRL's GRPOTrainer: rollout, old log-probs, four updates, weight hand-over.

The same tiny Qwen3-MoE from the same checkpoint, the same prompts, lengths, group size, precision and clip range, on one
thread. Each system runs in its own process and environment, and they take turns step by step; processor time is that of
the process. Routes are not measured, as TRL does not. Responses are sampled, so steps are compared by their tokens a second, prompts and responses together.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch

from tools.bench import models
from tools.bench.harness import Bench
from tools.bench.steps.turns import Teller

QWEN3_VOCABULARY = 151_936


def measure(bench: Bench) -> None:
    """Speed and memory, with the laptop recipes' 512 tokens and with as many as Qwen3 has."""
    _measure(bench, "", {}, speed_aim=3.0, memory_aim=0.5)
    _measure(bench, f", vocabulary {QWEN3_VOCABULARY:,}", {"vocab_size": QWEN3_VOCABULARY})


def _measure(
    bench: Bench,
    what: str,
    changes: dict[str, int],
    speed_aim: float | None = None,
    memory_aim: float | None = None,
) -> None:
    peers = os.environ["MEGATRON_GSPO_PEERS_PYTHON"]
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory)
        models.write_checkpoint(checkpoint, **changes)
        sides = {
            "ours": Teller(sys.executable, "tools.bench.steps.ours", checkpoint),
            "TRL": Teller(peers, "tools.bench.steps.trls", checkpoint),
        }
        probes = {name: torch.tensor(side.probe) for name, side in sides.items()}
        bench.same(f"log-probs of a fixed sequence{what}", probes["ours"], probes["TRL"], tolerance=1e-4)
        speeds = tokens_per_second(sides, bench.rounds)
        peaks = {name: side.finish() for name, side in sides.items()}
    ratios = [ours / theirs for ours, theirs in zip(speeds["ours"], speeds["TRL"], strict=True)]
    bench.figure(f"tokens a second{what}: ours / TRL", ratios, better="higher", aim=speed_aim)
    bench.figure(
        f"peak resident memory{what}: ours / TRL", [peaks["ours"] / peaks["TRL"]], better="lower", aim=memory_aim
    )


def tokens_per_second(sides: dict[str, Teller], rounds: int) -> dict[str, list[float]]:
    """Of each side in every round, in which all take a turn in order and one in reverse."""
    for side in sides.values():
        side.step()
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        spent = {name: [0.0, 0] for name in sides}
        for name in [*sides, *reversed(sides)]:
            seconds, tokens = sides[name].step()
            spent[name][0] += seconds
            spent[name][1] += tokens
        for name, (seconds, tokens) in spent.items():
            speeds[name].append(tokens / seconds)
    return speeds
