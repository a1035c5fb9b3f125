"""Log-prob and entropy from bfloat16 hidden states, forward and backward: ours, the naive form, and Liger's kernel.

In: random hidden states at Qwen3-30B-A3B's hidden size and vocabulary. Out: lines with milliseconds by CUDA's events,
beside the matrix products that recomputing the logits takes (8 · tokens · hidden · vocabulary operations), and the
peak of memory as a share of float32 logits' bytes. Before that every side is held against the naive form in float32.
On a CPU our side and the naive one run, are held against each other, and no time is reported.

Liger gives log-probs and no entropy, so ours is also measured without. Of it `liger_fused_linear_cross_entropy` is
called with `reduction="none"`, as each token has a coefficient of its own: release 0.8.5 then computes gradients in
the backward pass, from those coefficients. With "sum" or "mean" it computes them in the forward pass, for a
coefficient all tokens share. `accum_dtype` is float32, as our gradient of the weight is; what it returns is rounded to
bfloat16.

Shape legend: T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from statistics import median

import torch
from torch import Tensor

from megatron_gspo.config import ModelSection
from megatron_gspo.model.log_probs import token_log_probs
from megatron_gspo.platform import device
from tools.bench.logits import naive, products

#: As `install_peers.sh` installs it.
LIGER_VERSION = "0.8.5"
CHUNK_TOKENS = ModelSection.model_fields["log_probs_chunk_tokens"].default  # as training's; Liger's are its own
#: Largest difference of a log-prob or entropy beside the largest of them. bfloat16 rounds a logit by 2^-9 of it.
VALUE_TOLERANCE = 2**-8
#: Norm of a gradient's difference beside its own. Logits, their gradient and each token's coefficient are rounded by
#: 2^-9, and what is computed from them once more.
GRADIENT_TOLERANCE = 2**-6

#: hidden [T, H], weight [V, H], targets [T] -> log-probs [T], and entropies [T] where the side computes them
Side = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Sizes:
    """How much is computed."""

    vocabulary: int = 151_936
    hidden: int = 2048
    checked_tokens: int = 512  # whose float32 logits the naive form keeps several times over
    timed_tokens: int = 4096
    memory_tokens: int = 16_384  # the naive side: an eighth
    rounds: int = 5


TINY = Sizes(vocabulary=1000, hidden=64, checked_tokens=48, timed_tokens=48, memory_tokens=64, rounds=1)


@dataclass(frozen=True)
class Problem:
    """What every side is given."""

    hidden: Tensor  # [T, H] bfloat16, with gradient
    weight: Tensor  # [V, H] bfloat16, with gradient
    targets: Tensor  # [T] int64
    coefficients: Tensor  # [T, 2] float32, of log-probs and of entropies

    @classmethod
    def of(cls, sizes: Sizes, num_tokens: int) -> Problem:
        """Random, with logits that spread by 1."""
        generator = torch.Generator(device()).manual_seed(0)
        draw = partial(torch.randn, generator=generator, device=device())
        hidden = draw(num_tokens, sizes.hidden).bfloat16()
        weight = (draw(sizes.vocabulary, sizes.hidden) * sizes.hidden**-0.5).bfloat16()
        targets = torch.randint(sizes.vocabulary, (num_tokens,), generator=generator, device=device())
        return cls(hidden.requires_grad_(), weight.requires_grad_(), targets, draw(num_tokens, 2))

    def in_float32(self) -> Problem:
        """The same numbers, computed with exactly."""
        hidden, weight = (tensor.detach().float().requires_grad_() for tensor in (self.hidden, self.weight))
        return Problem(hidden, weight, self.targets, self.coefficients)

    def for_training(self) -> Problem:
        """The same, with a gradient of the weight that is there already, in float32 as Megatron's wrapper has one."""
        weight = self.weight.detach().requires_grad_()
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
        return Problem(self.hidden.detach().requires_grad_(), weight, self.targets, self.coefficients)


def measure_log_probs(sizes: Sizes) -> None:
    """Hold the sides against each other, then print what each takes.

    Raises:
        AssertionError: a side computes something else.
    """
    sides: dict[str, Side] = {"ours": ours, "ours, log-prob alone": partial(ours, with_entropy=False), "naive": naive}
    absent = why_no_liger()
    if absent is None:
        sides["Liger, log-prob alone"] = ligers()
    print(f"Log-prob and entropy in bfloat16, hidden size {sizes.hidden:,}, vocabulary {sizes.vocabulary:,}")
    for name, side in sides.items():
        values, gradients = hold_against_exact(side, Problem.of(sizes, sizes.checked_tokens))
        print(f"  {name}: values within {values:.1e}, gradients within {gradients:.2%} of the naive form in float32")
    if absent is not None:
        print(f"  Liger is left out: {absent}")
    milliseconds = timed(sides, sizes)
    if device().type != "cuda":
        print("  times and peaks of memory are measured on a GPU")
        return
    floor = median(milliseconds.pop("floor"))
    print(f"  {sizes.timed_tokens:,} tokens: the floor's matrix products {floor:.2f} ms")
    for name, found in milliseconds.items():
        middle, tokens = median(found), sizes.memory_tokens if name != "naive" else sizes.memory_tokens // 8
        share = peak_share(name, sides[name], sizes, tokens)
        print(
            f"  {name}: {middle:.2f} ms ({min(found):.2f} – {max(found):.2f}), {middle / floor:.2f} × the floor; peak "
            f"{share:.3f} × the bytes of float32 logits at {tokens:,} tokens, beyond gradients that were there"
        )


def why_no_liger() -> str | None:
    """Why Liger cannot be measured, and what to do about it; None where it can be."""
    if device().type != "cuda":
        return "its kernels need a GPU."
    if find_spec("liger_kernel") is None:
        return f"liger_kernel is not installed; `pip install --no-deps liger-kernel=={LIGER_VERSION}` installs it."
    return None


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, *, with_entropy: bool = True) -> tuple[Tensor, Tensor | None]:
    return token_log_probs(hidden, weight, targets, chunk_tokens=CHUNK_TOKENS, with_entropy=with_entropy)


def ligers() -> Side:
    """Liger's side; imported where it is wanted."""
    functional = import_module("liger_kernel.transformers.functional")

    def side(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, None]:
        losses = functional.liger_fused_linear_cross_entropy(
            hidden, weight, targets, reduction="none", accum_dtype=torch.float32
        )
        return -losses, None

    return side


def hold_against_exact(side: Side, problem: Problem) -> tuple[float, float]:
    """How far a side's values and gradients are from the naive form's in float32, as shares (see the tolerances).

    Gradients of log-probs and of entropies are compared each by itself: together the larger would hide the other.

    Raises:
        AssertionError: further than bfloat16's round-off, or not a number.
    """
    exact, trained = problem.in_float32(), problem.for_training()
    expected, found = (
        function(given.hidden, given.weight, given.targets) for function, given in ((naive, exact), (side, trained))
    )
    of_values, of_gradients = [], []
    for column, (value, other) in enumerate(zip(found, expected, strict=True)):
        if value is None:
            continue
        assert other is not None, "the naive form computes both"
        of_values.append(float((value - other).detach().abs().max() / other.detach().abs().max()))
        gradients = [
            backward(given, (output * problem.coefficients[:, column]).sum())
            for given, output in ((trained, value), (exact, other))
        ]
        for mine, exactly in zip(*gradients, strict=True):
            of_gradients.append(float((mine.float() - exactly).norm() / exactly.norm()))
    assert all(apart <= VALUE_TOLERANCE for apart in of_values), f"log-prob and entropy differ by {of_values}"
    assert all(apart <= GRADIENT_TOLERANCE for apart in of_gradients), f"gradients differ by {of_gradients}"
    return max(of_values), max(of_gradients)


def backward(problem: Problem, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of hidden states and weight, alone; the graph is kept."""
    main_grad: Tensor | None = getattr(problem.weight, "main_grad", None)
    problem.hidden.grad = problem.weight.grad = None
    problem.weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    if main_grad is not None:
        main_grad.zero_()
    loss.backward(retain_graph=True)
    of_weight = main_grad if getattr(problem.weight, "grad_added_to_main_grad", False) else problem.weight.grad
    assert problem.hidden.grad is not None, "it has one"
    assert of_weight is not None, "it has one"
    return problem.hidden.grad.clone(), of_weight.clone()


def accumulate(side: Side, problem: Problem) -> None:
    """Add the gradients to those that are there, as a micro-batch does."""
    log_probs, entropy = side(problem.hidden, problem.weight, problem.targets)
    loss = (log_probs * problem.coefficients[:, 0]).sum()
    if entropy is not None:
        loss = loss + (entropy * problem.coefficients[:, 1]).sum()
    loss.backward()
    if getattr(problem.weight, "grad_added_to_main_grad", False):
        problem.weight.grad = None  # as Megatron's hook leaves it


def timed(sides: Mapping[str, Side], sizes: Sizes) -> dict[str, list[float]]:
    """Milliseconds of every side and of the floor, two a round: there and back, after a run that is not counted."""
    problem = Problem.of(sizes, sizes.timed_tokens)
    runs: dict[str, Callable[[], None]] = {
        name: partial(accumulate, side, prepared(name, problem)) for name, side in sides.items()
    }
    runs["floor"] = products(problem.hidden, problem.weight)
    for run in runs.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(sizes.rounds):
        for name in (*runs, *reversed(runs)):
            found[name].append(milliseconds_of(runs[name]))
    return found


def prepared(name: str, problem: Problem) -> Problem:
    """The problem with the gradient of the weight where a side adds to it: ours to Megatron's, others to autograd's."""
    if name.startswith("ours"):
        return problem.for_training()
    weight = problem.weight.detach().requires_grad_()
    return Problem(problem.hidden.detach().requires_grad_(), weight, problem.targets, problem.coefficients)


def milliseconds_of(run: Callable[[], None]) -> float:
    """By the GPU's own events; on a CPU by the clock, which nobody reports."""
    if device().type != "cuda":
        started = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - started)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def peak_share(name: str, side: Side, sizes: Sizes, num_tokens: int) -> float:
    """Bytes allocated at the peak, beyond what was there when gradients were, over those of float32 logits [T, V]."""
    run = partial(accumulate, side, prepared(name, Problem.of(sizes, num_tokens)))
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / (num_tokens * sizes.vocabulary * 4)
