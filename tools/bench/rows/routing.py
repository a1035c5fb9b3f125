"""Routing: what recording, replaying, the shadow top-k and the statistics add to a step, and the rate of the latter.

What a session adds is timed where it does something: in the router calls, beyond a live top-k; where it is opened and
closed; and in the hooks that tell it which micro-batch comes. Each is a share of the live pass of the same round, on
which the same stopwatches run: differences of whole passes would drown in the machine's noise. A step is a forward and
a backward pass here; rollouts and the old-policy pass would only make the shares smaller.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_gspo.data.packing import pack
from megatron_gspo.model.policy import PolicyModel
from megatron_gspo.routing.change import check_routes, count_replaced, response_positions
from megatron_gspo.routing.record import MicroBatchRoutes
from megatron_gspo.routing.tap import RoutingTaps
from megatron_gspo.routing.volatility import RoutingChange, count_change
from megatron_gspo.training.routing import Comparison
from megatron_gspo.types import MicroBatch
from tools.bench import models
from tools.bench.harness import Bench, Times

STATISTICS_TOKENS, LAYERS, EXPERTS, TOP_K = 2048, 48, 128, 8  # Qwen3-30B-A3B's

Mode = Callable[[], AbstractContextManager[Any]]


def measure(bench: Bench) -> None:
    """Shares of a step, then the rate of the statistics."""
    measure_step(bench)
    measure_statistics(bench)


def measure_step(bench: Bench) -> None:
    """What each mode adds to a pass of 1,024 tokens through 4 layers, and the statistics of that pass's tokens."""
    model = models.policy(models.config())
    batch = pack(models.samples([256] * 4), pad_to_multiple=1, pad_token_id=0, device="cpu")
    taps = RoutingTaps([model])
    with taps.record([batch], margins=True) as recorded, torch.no_grad():
        model(batch)
    routes = recorded.natural_routes
    recording: dict[str, Mode] = {
        "recording": lambda: taps.record([batch]),
        "recording with margins": lambda: taps.record([batch], margins=True),
    }
    shadow: dict[str, Mode] = {
        "replaying beside a shadow top-k": lambda: taps.replay(routes, [batch], note_natural=True)
    }
    modes: dict[str, Mode] = {"live": nullcontext}
    modes |= recording | {"replaying": lambda: taps.replay(routes, [batch])} | shadow
    check_same_results(bench, model, batch, modes)
    check_noted_routes(bench, model, batch, recording | shadow)
    spent = {name: Spent() for name in modes}
    sides: dict[str, Callable[[], object]] = {
        name: partial(timed_pass, model, batch, mode, spent[name]) for name, mode in modes.items()
    }
    sides |= statistics_of_a_pass(taps, batch, routes[0])
    times = bench.alternate(sides)
    report_shares(bench, spent, times)
    bytes_per_token = routes[0].by_layer.nbytes / len(batch.token_ids) / len(taps.layout.moe_layers) * LAYERS
    bench.figure(f"bytes a token, {LAYERS} layers × {TOP_K}", [bytes_per_token], better="lower", aim=384)
    bench.profile(partial(timed_pass, model, batch, modes["recording"], Spent()), repeats=1)


def report_shares(bench: Bench, spent: Mapping[str, Spent], times: Times) -> None:
    """What each mode adds, in the routers and in all, and the statistics, as shares of the live pass."""
    live, live_pass = spent["live"], times.seconds["live"]
    for name in (name for name in spent if name != "live"):
        in_routers = beyond(spent[name].in_routers, live.in_routers, live_pass)
        around = beyond(spent[name].around, live.around, live_pass)
        in_all = [routers + rest for routers, rest in zip(in_routers, around, strict=True)]
        bench.figure(f"{name}: all that it adds / the pass", in_all, better="lower", aim=0.01)
        bench.figure(f"{name}: in the routers, beyond a live top-k / the pass", in_routers, better="lower")
    for name in ("change rate", "all statistics"):
        shares = times.ratio(name, "live")
        bench.figure(f"{name} of the pass's response tokens / the pass", shares, better="lower", aim=0.01)


def beyond(seconds: Sequence[float], live: Sequence[float], live_pass: Sequence[float]) -> list[float]:
    """`seconds` of a mode's turns less those of the live mode, as shares of `live_pass`, round by round."""
    triples = zip(by_round(seconds), by_round(live), live_pass, strict=True)
    return [(mode_s - live_s) / pass_s for mode_s, live_s, pass_s in triples]


def by_round(turns: Sequence[float]) -> list[float]:
    """Seconds of the two turns of every round together; the first of all turns was before the clock started."""
    return [there + back for there, back in zip(turns[1::2], turns[2::2], strict=True)]


def check_same_results(bench: Bench, model: PolicyModel, batch: MicroBatch, modes: Mapping[str, Mode]) -> None:
    """Every mode leaves log-probs and gradient as they are; what is replayed is what the routers choose anyway."""
    found = {name: results(model, batch, mode) for name, mode in modes.items()}
    for name in (name for name in modes if name != "live"):
        bench.same(f"log-probs, {name} and live", found[name][0], found["live"][0], tolerance=0)
        bench.same(f"gradient of the embedding, {name} and live", found[name][1], found["live"][1], tolerance=1e-6)


def results(model: PolicyModel, batch: MicroBatch, mode: Mode) -> tuple[Tensor, Tensor]:
    """Log-probs [T], and the gradient of the embedding [vocabulary, hidden]."""
    model.zero_grad()
    with mode():
        log_probs = model(batch).log_probs
        log_probs.mean().backward()
    gradient = model.embedding.word_embeddings.weight.grad
    assert gradient is not None
    return log_probs.detach(), gradient.clone()


def check_noted_routes(bench: Bench, model: PolicyModel, batch: MicroBatch, modes: Mapping[str, Mode]) -> None:
    """What each of `modes` notes is what the untouched routers sent tokens to."""
    sent: dict[str, Tensor] = {}  # layer -> [S, E] bool
    routers = {f"layer {layer.layer_number}": layer.mlp.router for layer in model.decoder.layers}
    hooks = [
        router.register_forward_hook(lambda _module, _inputs, output, name=name: sent.update({name: output[1]}))
        for name, router in routers.items()
    ]
    with torch.no_grad():
        model(batch)
    for hook in hooks:
        hook.remove()
    for name, mode in modes.items():
        with mode() as session, torch.no_grad():
            model(batch)
        of_layers = session.natural_routes[0].by_layer.long()
        noted = {
            layer: torch.zeros_like(sent[layer]).scatter_(1, experts, True)
            for layer, experts in zip(routers, of_layers, strict=True)
        }
        bench.identical(f"experts noted while {name}, and those that tokens were sent to", noted, sent)


def statistics_of_a_pass(
    taps: RoutingTaps, batch: MicroBatch, routes: MicroBatchRoutes
) -> dict[str, Callable[[], object]]:
    """The change rate of the pass's response tokens, and all that a step counts of them, margins included."""
    # A tenth of the tokens of each layer are sent to other experts.
    moved = torch.rand(routes.by_layer.shape[:2], generator=torch.Generator().manual_seed(0)) < 0.1
    old, new = routes.by_layer, torch.where(moved[..., None], (routes.by_layer + 1) % EXPERTS, routes.by_layer)
    assert routes.margins is not None, "recorded with margins"
    margins = routes.margins

    def of_response(by_layer: Tensor) -> Tensor:
        """[L, S, K] uint8 to [T, L, K] int16, which is what a step compares in."""
        return by_layer.transpose(0, 1)[batch.predicting_positions].to(torch.int16)

    def everything() -> Comparison:
        counted = Comparison.empty(taps.layout)
        counted.add(taps.layout, batch, of_response(old), of_response(new), margins[batch.predicting_positions])
        return counted

    return {
        "change rate": lambda: count_replaced(of_response(old), of_response(new)),
        "all statistics": everything,
    }


@dataclass
class Spent:
    """Processor seconds of a mode, one entry a turn."""

    in_routers: list[float] = field(default_factory=list)  # in what the routers ask for their top-k
    around: list[float] = field(default_factory=list)  # opening and closing its session, and in the hooks of layers


def timed_pass(model: PolicyModel, batch: MicroBatch, mode: Mode, spent: Spent) -> None:
    """A forward and a backward pass; appends this turn's seconds to `spent`."""
    model.zero_grad()
    with stopwatches(model, mode, spent):
        model(batch).log_probs.mean().backward()


@contextmanager
def stopwatches(model: PolicyModel, mode: Mode, spent: Spent) -> Iterator[None]:
    """Be in `mode`, with stopwatches wherever a session does something, whether there is one or not."""
    in_routers, around = Stopwatch(), Stopwatch()
    told = [model.decoder, *model.decoder.layers]  # what a session has hooks on, which run in the order they came in
    hooks = [module.register_forward_pre_hook(around.start) for module in told]
    routers = [layer.mlp.router for layer in model.decoder.layers]
    with ExitStack() as entered:
        around.start()
        entered.enter_context(mode())
        around.stop()
        hooks += [module.register_forward_pre_hook(around.stop) for module in told]
        answers = [router.router_replay for router in routers]
        for router, answer in zip(routers, answers, strict=True):
            router.router_replay = _TimedAnswer(answer, in_routers)
        yield
        for router, answer in zip(routers, answers, strict=True):
            router.router_replay = answer
        around.start()
        entered.close()
        around.stop()
    for hook in hooks:
        hook.remove()
    spent.in_routers.append(in_routers.seconds)
    spent.around.append(around.seconds)


class Stopwatch:
    """Adds up this process's time on processors from each start to the stop after it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = 0.0

    def start(self, *_: object) -> None:
        """Also a forward pre-hook."""
        self._started = time.process_time()

    def stop(self, *_: object) -> None:
        """Also a forward pre-hook."""
        self.seconds += time.process_time() - self._started


class _TimedAnswer:
    """What a router asks, whoever answers."""

    def __init__(self, answer: Any, stopwatch: Stopwatch) -> None:
        self._answer = answer
        self._stopwatch = stopwatch

    def get_replay_topk(self, scores: Any, topk: Any, num_groups: Any, group_topk: Any, compute: Any) -> Any:
        self._stopwatch.start()
        if self._answer is None:
            found = compute(scores, topk, num_groups, group_topk)
        else:
            found = self._answer.get_replay_topk(scores, topk, num_groups, group_topk, compute)
        self._stopwatch.stop()
        return found


def measure_statistics(bench: Bench) -> None:
    """Counting changes: this project's, and the usual ways of finding how much of two sets is common."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(STATISTICS_TOKENS, LAYERS, EXPERTS, generator=generator)
    old = scores.topk(TOP_K).indices.to(torch.uint8)
    new = (scores + 0.01 * torch.rand(scores.shape, generator=generator)).topk(TOP_K).indices.to(torch.uint8)
    del scores
    check_routes(old, EXPERTS)
    positions = response_positions(torch.tensor([0, STATISTICS_TOKENS]))
    by_pairs = replaced_by_pairs(old, new)
    bench.same("experts replaced", count_replaced(old, new), by_pairs, tolerance=0)
    change = count_change(old, new, num_experts=EXPERTS, layers=range(LAYERS), positions=positions)
    for what, counted in replaced_by_layer(change).items():
        bench.same(f"experts replaced by layer, from {what}", counted, by_pairs.sum(0), tolerance=0)
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


def replaced_by_layer(change: RoutingChange) -> dict[str, Tensor]:
    """How many experts were replaced in each layer, [L], by each of the counts that say so."""
    return {
        "tokens by experts replaced": change.tokens.sum(1) @ torch.arange(TOP_K + 1),
        "tokens that left an expert": change.lost.sum(1),
        "tokens that joined one": change.gained.sum(1),
    }


def replaced_by_pairs(old: Tensor, new: Tensor) -> Tensor:
    """What one writes first, all K × K pairs at once: experts replaced, [T, L]."""
    return TOP_K - (old[..., :, None] == new[..., None, :]).any(-1).sum(-1)
