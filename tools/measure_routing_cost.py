"""What recording and replaying routes costs, as a share of a forward and backward pass, and in bytes a token.

    python tools/measure_routing_cost.py [--rounds 15]

Modes take turns within every round, so that a machine whose speed swings slows them all alike; each is compared with the
live pass of its own round. `in routers` is the time the router calls themselves take beyond a live top-k, `pass` the
whole pass; both are medians over the rounds, as shares of the live pass.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig

from megatron_gspo import parallel
from megatron_gspo.config import ModelSection, ParallelSection
from megatron_gspo.data.packing import pack
from megatron_gspo.model.build import build_policy
from megatron_gspo.model.hf_weights import initialize_weights
from megatron_gspo.model.policy import PolicyModel
from megatron_gspo.platform import device
from megatron_gspo.routing.tap import RoutingTaps
from megatron_gspo.types import MicroBatch, Sample

#: Qwen3-30B-A3B's routing (128 experts, 8 a token) in layers a machine without a GPU can run.
CONFIG = Qwen3MoeConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=96,
    norm_topk_prob=True,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--rounds", type=int, default=15)
    rounds = arguments.parse_args().rounds
    parallel.initialize_distributed()
    parallel.initialize_model_parallel(ParallelSection(), seed=1)
    (policy,) = build_policy(CONFIG, ModelSection(path=Path(), dtype="float32"), ParallelSection())
    initialize_weights([policy], seed=1, initializer_range=0.02)
    batch, taps = responses(num_samples=4, num_tokens=512), RoutingTaps([policy])
    with taps.record([batch]) as recorded, torch.no_grad():
        policy(batch)
    routes = recorded.natural_routes
    modes: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "live": nullcontext,
        "record": lambda: taps.record([batch]),
        "record with margins": lambda: taps.record([batch], margins=True),
        "replay": lambda: taps.replay(routes, [batch]),
        "replay, natural top-k noted": lambda: taps.replay(routes, [batch], note_natural=True),
    }
    timed: dict[str, list[tuple[float, float]]] = {name: [] for name in modes}
    for _ in range(rounds + 1):
        for name, mode in modes.items():
            timed[name].append(timed_pass(policy, batch, mode))
    print(f"{len(batch.token_ids)} tokens, {CONFIG.num_hidden_layers} layers, {rounds} rounds")
    print(f"a live top-k: {share(timed['live'], timed['live'], lambda mode, live: mode[1] / live[0]):.2%} of a pass")
    for name in list(modes)[1:]:
        in_routers = share(timed[name], timed["live"], lambda mode, live: (mode[1] - live[1]) / live[0])
        whole = share(timed[name], timed["live"], lambda mode, live: mode[0] / live[0] - 1)
        print(f"{name:28} in routers {in_routers:+.2%}   pass {whole:+.2%}")
    print(f"bytes a token: {taps.layout.bytes_per_token / len(taps.layout.moe_layers):.0f} a layer")


def share(mode: list[tuple[float, float]], live: list[tuple[float, float]], of: Callable[[Any, Any], float]) -> float:
    """The median over rounds, without the first."""
    return statistics.median(of(*times) for times in list(zip(mode, live, strict=True))[1:])


def timed_pass(
    policy: PolicyModel, batch: MicroBatch, mode: Callable[[], AbstractContextManager[Any]]
) -> tuple[float, float]:
    """Seconds of a forward and backward pass, and those inside the routers' top-k."""
    policy.zero_grad()
    synchronize()
    started = time.perf_counter()
    with mode(), timed_routers(policy) as in_routers:
        policy(batch).log_probs.mean().backward()
    synchronize()
    return time.perf_counter() - started, sum(in_routers)


@contextmanager
def timed_routers(policy: PolicyModel) -> Iterator[list[float]]:
    """Put a stopwatch around what every router asks, whoever answers."""
    seconds: list[float] = []
    routers = [layer.mlp.router for layer in policy.decoder.layers]
    answers = [router.router_replay for router in routers]
    for router, answer in zip(routers, answers, strict=True):
        router.router_replay = _Stopwatch(answer, seconds)
    yield seconds
    for router, answer in zip(routers, answers, strict=True):
        router.router_replay = answer


class _Stopwatch:
    def __init__(self, answer: Any, seconds: list[float]) -> None:
        self._answer = answer
        self._seconds = seconds

    def get_replay_topk(self, scores: Any, topk: Any, num_groups: Any, group_topk: Any, compute: Any) -> Any:
        synchronize()
        started = time.perf_counter()
        if self._answer is None:
            found = compute(scores, topk, num_groups, group_topk)
        else:
            found = self._answer.get_replay_topk(scores, topk, num_groups, group_topk, compute)
        synchronize()
        self._seconds.append(time.perf_counter() - started)
        return found


def responses(num_samples: int, num_tokens: int) -> MicroBatch:
    """A packed micro-batch of random tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(CONFIG.vocab_size, (num_samples, num_tokens), generator=generator).numpy()
    samples = [
        Sample(index, row[:64], row[64:], advantage=0.0, behaviour_log_probs=row[64:].astype("float32"))
        for index, row in enumerate(tokens)
    ]
    return pack(samples, pad_to_multiple=1, pad_token_id=0, device=device())


def synchronize() -> None:
    """Wait for the device, so that clocks tell the truth."""
    if device().type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
