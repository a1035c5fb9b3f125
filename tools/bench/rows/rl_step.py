"""A whole step of GSPO beside TRL's GRPOTrainer: rollout, old log-probs, four updates, weight hand-over.

The same tiny Qwen3-MoE from the same checkpoint, the same prompts, lengths, group size, precision and clip range, on
one thread. Each system runs in its own process and environment, and they take turns step by step; processor time and
memory are those of the process and all that it starts: a reward of one's own is computed in further processes by this
project, one a core, and in the trainer's by TRL. Routes are not measured, as TRL does not. Responses are sampled, so
steps are compared by their tokens a second, prompts and responses together, padding not counted.

Before the first step both make one update on the same responses with the same advantages and old log-probs. Held equal
are log-probs before it, its loss, the norm of its gradient, and what it changes of the log-probs of a sequence, which
stands for the weights: their layouts differ. Ratios lie on both sides of both clips.
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
from tools.bench.steps.turns import Compared, Step, Teller


@dataclass(frozen=True)
class Setting:
    """What the two sides are compared at."""

    name: str
    max_response_tokens: int
    mean_response_tokens: float | None = None  # None: nearly all go on to the last token
    vocab_size: int = 272  # the laptop recipes'
    speed_aim: float | None = None  # at least
    memory_aim: float | None = None  # at most
    profiled: bool = False  # where our time goes is reported


SETTINGS = (
    Setting("lengths with a long tail", 256, mean_response_tokens=48, speed_aim=3.0, memory_aim=0.5),
    Setting("lengths alike", 24, speed_aim=3.0, memory_aim=0.5, profiled=True),
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
        hold_equal(bench, setting.name, sides["ours"].compared, sides["TRL"].compared)
        rounds = take_turns(bench, sides)
        peaks = {name: side.finish() for name, side in sides.items()}
    speed = [tokens_per_second(made["ours"]) / tokens_per_second(made["TRL"]) for made in rounds]
    bench.figure(f"tokens a second, {setting.name}: ours / TRL", speed, better="higher", aim=setting.speed_aim)
    memory = [peaks["ours"] / peaks["TRL"]]
    bench.figure(f"peak resident memory, {setting.name}: ours / TRL", memory, better="lower", aim=setting.memory_aim)
    if setting.profiled:
        bench.result.profile = shares([step for made in rounds for step in made["ours"]])
        bench.note(f"Where our time goes is the stages' share of steps with {setting.name}, by the clock on the wall.")


def hold_equal(bench: Bench, setting: str, ours: Compared, theirs: Compared) -> None:
    """Hold both sides' update on fixed samples against each other.

    Raises:
        DifferentResultsError: they differ.
    """
    pairs = {
        "log-probs of a fixed sequence": (ours.before, theirs.before, 1e-4),
        "loss on fixed samples": ([ours.loss], [theirs.loss], 1e-5),
        "norm of its gradient": ([ours.gradient_norm], [theirs.gradient_norm], 1e-5),
        # Adam's first update is the rate times the gradient's sign, nearly: rounding decides where it is about 0.
        "what its update changes": (changes(ours), changes(theirs), 1e-3),
    }
    for what, (own, other, tolerance) in pairs.items():
        bench.same(f"{what}, {setting}", torch.tensor(own), torch.tensor(other), tolerance=tolerance)


def changes(side: Compared) -> list[float]:
    """What an update adds to the log-prob of each token of a fixed sequence."""
    return [after - before for before, after in zip(side.before, side.after, strict=True)]


def take_turns(bench: Bench, sides: dict[str, Teller]) -> list[dict[str, list[Step]]]:
    """Of every round, the two steps of each side: all take a turn in order and one in reverse."""
    for side in sides.values():
        side.step()
    rounds = []
    for _ in range(bench.rounds):
        bench.probe_machine()
        made: dict[str, list[Step]] = {name: [] for name in sides}
        for name in [*sides, *reversed(sides)]:
            made[name].append(sides[name].step())
        rounds.append(made)
    return rounds


def tokens_per_second(made: list[Step]) -> float:
    """Of several steps together."""
    return sum(step.tokens for step in made) / sum(step.seconds for step in made)


def shares(made: list[Step]) -> list[tuple[str, float]]:
    """Each stage's share of whole steps, and that of what belongs to none; the largest first."""
    seconds = {name: sum(step.stages[name] for step in made) for name in made[0].stages}
    whole = seconds.pop("whole step")
    seconds["packing, metrics and the rest"] = whole - sum(seconds.values())
    return sorted(((name, spent / whole) for name, spent in seconds.items()), key=lambda entry: -entry[1])
