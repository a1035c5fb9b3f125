"""Log-prob and entropy from hidden states, forward and backward, at Qwen3-30B-A3B's vocabulary and hidden size.

Beside the naive computation, which forms all logits, TRL's chunked function and verl's. Where time is measured, every side
adds to gradients that are there already, as micro-batches do: ours to Megatron's, the others to autograd's. Two floors: of
time, the matrix products that recomputing the logits takes, 8 · tokens · hidden · vocabulary operations; of memory,
nothing but the gradient of the weight, so the peak is given as a share of the logits' bytes.

TRL's and verl's functions give the gradients of log-prob and entropy too, by tiles of their own; a note beside the
figures says of which sizes, and that TRL's runs without its Triton kernels here.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE, ChunkedLogProbFunction
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE
from verl.utils.experimental.torch_functional import FusedLinearForPPO

from megatron_gspo.config import ModelSection
from megatron_gspo.model.log_probs import token_log_probs
from tools.bench.harness import Bench, alternate
from tools.bench.logits import naive, products
from tools.bench.memory import peak_bytes

VOCABULARY, HIDDEN = 151_936, 2048
CHUNK_TOKENS = ModelSection.model_fields["log_probs_chunk_tokens"].default  # as training's; the peers' are their own
TOKENS = CHUNK_TOKENS  # where time is measured: a naive side of half a minute
MEMORY_TOKENS, MEMORY_HIDDEN = 8 * CHUNK_TOKENS, 32  # hidden states small beside logits, as they are in any real model

Side = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def measure(bench: Bench) -> None:
    """Time, memory, and what rows without a gradient cost."""
    sides: dict[str, Side] = {"ours": ours, "naive": naive, "TRL": trls, "verl": verls}
    hidden, weight, targets, coefficients = problem(TOKENS)
    check_same(bench, sides, hidden, weight, targets, coefficients)
    gc.collect()
    runs = {
        name: partial(accumulate, side, hidden, trained(weight, side), targets, coefficients)
        for name, side in sides.items()
    }
    times = bench.alternate(runs | {"floor": products(hidden, weight)}, rounds=max(2, bench.rounds // 2))
    for name in ("naive", "TRL", "verl"):
        bench.figure(f"{name}'s time / ours", times.ratio(name, "ours"), better="higher", aim=1.0)
    bench.figure("our time / the floor's matrix products", times.ratio("ours", "floor"), better="lower", aim=1.1)
    measure_zero_rows(bench, hidden, weight, targets, coefficients)
    bench.profile(runs["ours"], repeats=1)
    del runs
    measure_memory(bench, sides)


def check_same(
    bench: Bench, sides: dict[str, Side], hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor
) -> None:
    """Every side's log-probs, entropies and gradients beside the naive ones."""
    expected = results(naive, hidden, weight, targets, coefficients)
    for name in ("ours", "TRL", "verl"):
        found = results(sides[name], hidden, weight, targets, coefficients)
        for what, result in found.items():
            bench.same(f"{what}, {name} beside naive", result, expected[what], tolerance=2e-4)


def measure_zero_rows(bench: Bench, hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> None:
    """Half of the rows with a coefficient of exactly 0, as clipped responses and groups of equal rewards have.

    The weight's gradient is one of its own here, which both sides make.
    """
    half = coefficients.clone()
    half[: len(half) // 2] = 0
    log_probs, entropy = ours(hidden, weight, targets)

    def backward(of: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((log_probs * of[:, 0]).sum(), (hidden, weight), retain_graph=True)

    kept = slice(len(half) // 2, None)
    alone = torch.autograd.grad((ours(hidden[kept], weight, targets[kept])[0] * half[kept, 0]).sum(), weight)[0]
    bench.same("gradient of the weight, half the rows 0", backward(half)[1], alone, tolerance=1e-5)
    times = alternate(
        {"half": partial(backward, half), "all": partial(backward, coefficients)}, max(2, bench.rounds // 2)
    )
    ratios = [half_s / all_s for half_s, all_s in zip(times["half"], times["all"], strict=True)]
    bench.figure("backward with half the rows' coefficients 0 / with none", ratios, better="lower", aim=0.6)
    del entropy


def measure_memory(bench: Bench, sides: dict[str, Side]) -> None:
    """Peak memory as a share of the logits' bytes: the same every time, so measured once.

    Ours at both sizes: the naive side, which takes five times the logits' bytes, is measured at one chunk's alone.
    """
    for name, tokens in (
        ("ours", MEMORY_TOKENS),
        ("TRL", MEMORY_TOKENS),
        ("verl", MEMORY_TOKENS),
        ("ours", CHUNK_TOKENS),
        ("naive", CHUNK_TOKENS),
    ):
        hidden, weight, targets, coefficients = problem(tokens, MEMORY_HIDDEN)
        run = partial(accumulate, sides[name], hidden, trained(weight, sides[name]), targets, coefficients)
        share = peak_bytes(run) / (tokens * VOCABULARY * 4)
        aim = 0.25 if (name, tokens) == ("ours", MEMORY_TOKENS) else None
        figure = f"peak memory of {name}, {tokens:,} tokens / the logits' bytes"
        bench.figure(figure, [share], better="lower", aim=aim)
    bench.note(
        f"memory at hidden size {MEMORY_HIDDEN}, where the weight's gradient takes {MEMORY_HIDDEN / MEMORY_TOKENS:.3f} "
        f"of the logits' bytes of {MEMORY_TOKENS:,} tokens and {MEMORY_HIDDEN / CHUNK_TOKENS:.3f} of {CHUNK_TOKENS:,}"
    )
    bench.note(
        "TRL's function ran what it falls back to without Triton, which a CPU lacks; its tiles are "
        f"{TOKEN_CHUNK_SIZE:,} tokens × {_CHUNKED_LOGPROB_CHUNK_SIZE:,} of the vocabulary, and verl's "
        f"{FusedLinearForPPO().chunk_size:,} tokens × all of it: beyond a tile neither's buffers grow with the tokens"
    )


def problem(num_tokens: int, hidden_size: int = HIDDEN) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states [T, H], weight [V, H], targets [T], and the coefficients of log-probs and entropies [T, 2]."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator).requires_grad_()
    weight = (torch.randn(VOCABULARY, hidden_size, generator=generator) * hidden_size**-0.5).requires_grad_()
    targets = torch.randint(VOCABULARY, (num_tokens,), generator=generator)
    return hidden, weight, targets, torch.randn(num_tokens, 2, generator=generator)


def results(side: Side, hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> dict[str, Tensor]:
    """Log-probs [T], entropies [T], and the gradients of hidden states [T, H] and weight [V, H], from nothing."""
    hidden, weight = hidden.detach().requires_grad_(), trained(weight, side)
    log_probs, entropy = accumulate(side, hidden, weight, targets, coefficients)
    of_weight = weight.main_grad if side is ours else weight.grad  # type: ignore[attr-defined]
    assert hidden.grad is not None
    assert of_weight is not None
    return {
        "log-probs": log_probs,
        "entropies": entropy,
        "gradient of hidden": hidden.grad,
        "gradient of weight": of_weight,
    }


def accumulate(
    side: Side, hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    """Add the gradients to those that are there. Returns log-probs and entropies, [T] each, detached."""
    log_probs, entropy = side(hidden, weight, targets)
    (log_probs * coefficients[:, 0] + entropy * coefficients[:, 1]).sum().backward()
    if side is ours:
        weight.grad = None  # as Megatron's hook leaves it
    return log_probs.detach(), entropy.detach()


def trained(weight: Tensor, side: Side) -> Tensor:
    """The same weight as a parameter; ours as Megatron's data-parallel wrapper leaves one."""
    parameter = weight.detach().requires_grad_()
    if side is ours:
        parameter.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
    return parameter


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_probs, entropy = token_log_probs(hidden, weight, targets, chunk_tokens=CHUNK_TOKENS)
    assert entropy is not None
    return log_probs, entropy


def trls(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    outputs = ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("entropy",)
    )
    return outputs[0], outputs[1]


def verls(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return FusedLinearForPPO()(hidden, weight, targets)
