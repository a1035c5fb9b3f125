"""Routing: what recording, replaying and the shadow top-k add to a step, and how fast changes are counted.

The costs are those of the router calls themselves beyond a live top-k, as a share of the live pass of the same round:
differences of whole passes would drown in the machine's noise. A step is a forward and a backward pass here; rollouts and
the old-policy pass would only make the shares smaller.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megatron_gspo.data.packing import pack
from megatron_gspo.model.policy import PolicyModel
from megatron_gspo.routing.change import check_routes, count_replaced, response_positions
from megatron_gspo.routing.tap import RoutingTaps
from megatron_gspo.routing.volatility import count_change
from megatron_gspo.types import MicroBatch
from tools.bench import models
from tools.bench.harness import Bench

STATISTICS_TOKENS, LAYERS, EXPERTS, TOP_K = 2048, 48, 128, 8  # Qwen3-30B-A3B's


def measure(bench: Bench) -> None:
    """Costs in the routers, then the statistics."""
    measure_tap(bench)
    measure_statistics(bench)


def measure_tap(bench: Bench) -> None:
    model = models.policy(models.config())
    batch = pack(models.samples([256] * 4), pad_to_multiple=1, pad_token_id=0, device="cpu")
    taps = RoutingTaps([model])
    with taps.record([batch]) as recorded, torch.no_grad():
        model(batch)
    routes = recorded.natural_routes
    check_same_gradient(bench, model, batch, lambda: taps.replay(routes, [batch]))
    modes: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "live": nullcontext,
        "recording": lambda: taps.record([batch]),
        "recording with margins": lambda: taps.record([batch], margins=True),
        "replaying": lambda: taps.replay(routes, [batch]),
        "replaying beside a shadow top-k": lambda: taps.replay(routes, [batch], note_natural=True),
    }
    in_routers: dict[str, list[float]] = {name: [] for name in modes}
    sides = {name: partial(timed_pass, model, batch, mode, in_routers[name]) for name, mode in modes.items()}
    times = bench.alternate(sides)
    # The first turn was before the clock started; after it two a round, as in `times`.
    by_round = {name: [a + b for a, b in list(pairwise(spent[1:]))[::2]] for name, spent in in_routers.items()}
    for name in list(modes)[1:]:
        triples = zip(by_round[name], by_round["live"], times.seconds["live"], strict=True)
        shares = [(mode - live) / whole for mode, live, whole in triples]
        bench.figure(f"{name}, beyond a live top-k / the pass", shares, better="lower", aim=0.01)
    bytes_per_token = routes[0].by_layer.nbytes / len(batch.token_ids) / len(taps.layout.moe_layers) * LAYERS
    bench.figure(f"bytes a token, {LAYERS} layers × {TOP_K}", [bytes_per_token], better="lower", aim=384)
    bench.profile(partial(timed_pass, model, batch, modes["recording"], []), repeats=1)


def check_same_gradient(
    bench: Bench, model: PolicyModel, batch: MicroBatch, replay: Callable[[], AbstractContextManager[Any]]
) -> None:
    """Replaying what the router chooses anyway leaves the gradient as it is."""
    gradients = []
    for mode in (nullcontext, replay):
        timed_pass(model, batch, mode, [])
        gradients.append(model.embedding.word_embeddings.weight.grad.clone())
    bench.same("gradient of the embedding, replayed and live", gradients[1], gradients[0], tolerance=1e-6)


def timed_pass(
    model: PolicyModel, batch: MicroBatch, mode: Callable[[], AbstractContextManager[Any]], spent: list[float]
) -> None:
    """A forward and a backward pass; appends the seconds inside the routers' top-k to `spent`."""
    model.zero_grad()
    with mode(), stopwatches(model) as seconds:
        model(batch).log_probs.mean().backward()
    spent.append(sum(seconds))


@contextmanager
def stopwatches(model: PolicyModel) -> Iterator[list[float]]:
    """Put one around what every router asks, whoever answers."""
    seconds: list[float] = []
    routers = [layer.mlp.router for layer in model.decoder.layers]
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
        started = time.process_time()
        if self._answer is None:
            found = compute(scores, topk, num_groups, group_topk)
        else:
            found = self._answer.get_replay_topk(scores, topk, num_groups, group_topk, compute)
        self._seconds.append(time.process_time() - started)
        return found


def measure_statistics(bench: Bench) -> None:
    """Counting changes: this project's, and the usual ways of finding how much of two sets is common."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(STATISTICS_TOKENS, LAYERS, EXPERTS, generator=generator)
    old = scores.topk(TOP_K).indices.to(torch.uint8)
    new = (scores + 0.01 * torch.rand(scores.shape, generator=generator)).topk(TOP_K).indices.to(torch.uint8)
    del scores
    check_routes(old, EXPERTS)
    bench.same("experts replaced", count_replaced(old, new).float(), replaced_by_pairs(old, new).float(), tolerance=0)
    positions = response_positions(torch.tensor([0, STATISTICS_TOKENS]))
    sides: dict[str, Callable[[], object]] = {
        "change rate": lambda: count_replaced(old, new),
        "everything": lambda: count_change(old, new, num_experts=EXPERTS, layers=range(LAYERS), positions=positions),
        "all pairs": lambda: replaced_by_pairs(old, new),
    }
    times = bench.alternate(sides)
    pairs = 2 * STATISTICS_TOKENS * LAYERS / 1e6  # two turns a round
    for name, aim in (("change rate", 5.0), ("everything", None)):
        rates = [pairs / seconds for seconds in times.seconds[name]]
        bench.figure(f"{name}: million token-layers a second of one core", rates, better="higher", aim=aim)
    bench.figure(
        "time of comparing all pairs / change rate", times.ratio("all pairs", "change rate"), better="higher", aim=1.0
    )


def replaced_by_pairs(old: Tensor, new: Tensor) -> Tensor:
    """What one writes first: all K × K pairs at once."""
    return TOP_K - (old[..., :, None] == new[..., None, :]).any(-1).sum(-1)
