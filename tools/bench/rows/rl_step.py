"""A whole step of GSPO beside TRL's GRPOTrainer: rollout, old log-probs, four updates, weight hand-over.

The same tiny Qwen3-MoE from the same checkpoint, the same prompts, lengths, group size, precision and clip range, on one
thread. Each system runs in its own process and environment, and they take turns step by step; processor time is that of
the process. Routes are not measured, as TRL does not. Responses are sampled, so steps are compared by their tokens a second,
prompts and responses together, padding not counted.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from tools.bench import models
from tools.bench.harness import Bench
from tools.bench.steps.turns import Teller


@dataclass(frozen=True)
class Setting:
    """What the two sides are compared at."""

    name: str
    max_response_tokens: int
    mean_response_tokens: float | None = None  # None: nearly all go on to the last token
    vocab_size: int = 272  # the laptop recipes'
    speed_aim: float | None = None  # at least
    memory_aim: float | None = None  # at most


SETTINGS = (
    Setting("lengths with a long tail", 256, mean_response_tokens=48, speed_aim=3.0, memory_aim=0.5),
    Setting("lengths alike", 24, speed_aim=3.0, memory_aim=0.5),
    Setting("lengths alike, vocabulary 151,936", 24, vocab_size=151_936),  # Qwen3's
)


def measure(bench: Bench) -> None:
    """Speed and memory at every setting."""
    for setting in SETTINGS:
        _measure(bench, setting)


def _measure(bench: Bench, setting: Setting) -> None:
    peers = os.environ["MEGATRON_GSPO_PEERS_PYTHON"]
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory)
        models.write_checkpoint(
            checkpoint, mean_response_tokens=setting.mean_response_tokens, vocab_size=setting.vocab_size
        )
        arguments = (checkpoint, str(setting.max_response_tokens))
        sides = {
            "ours": Teller(sys.executable, "tools.bench.steps.ours", *arguments),
            "TRL": Teller(peers, "tools.bench.steps.trls", *arguments),
        }
        probes = {name: torch.tensor(side.probe) for name, side in sides.items()}
        bench.same(f"log-probs of a fixed sequence, {setting.name}", probes["ours"], probes["TRL"], tolerance=1e-4)
        speeds = tokens_per_second(sides, bench.rounds)
        peaks = {name: side.finish() for name, side in sides.items()}
    speed = [ours / theirs for ours, theirs in zip(speeds["ours"], speeds["TRL"], strict=True)]
    bench.figure(f"tokens a second, {setting.name}: ours / TRL", speed, better="higher", aim=setting.speed_aim)
    memory = [peaks["ours"] / peaks["TRL"]]
    bench.figure(f"peak resident memory, {setting.name}: ours / TRL", memory, better="lower", aim=setting.memory_aim)


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
