"""The policy loss, forward and backward, of 64 responses × 4,096 tokens, beside TRL's and verl's on the same tensors.

Each side returns its loss with its own metrics, as its trainer calls it. TRL's is the loss method of its GRPOTrainer, handed
log-probs instead of a model. The floor reads and writes 16 bytes a token: two log-probs in, a gradient out, and one more.
Three more measures of how near it one can come: GSPO and our metrics as a few plain lines for responses of one length, fused
by `torch.compile` into native code; the difference of the log-probs alone; and autograd alone, a function that computes
nothing and hands back memory that nobody has written.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer
from verl.trainer.ppo.core_algos import compute_policy_loss_gspo, compute_policy_loss_vanilla
from verl.workers.config import ActorConfig

from megatron_gspo.policy_loss import OBJECTIVES, policy_loss
from tools.bench.harness import Bench, copy_probe

NUM_RESPONSES, TOKENS = 64, 4096
CALLS = 5  # a turn: one takes about a millisecond


def measure(bench: Bench) -> None:
    """GSPO, then GRPO."""
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(NUM_RESPONSES, TOKENS, generator=generator)
    # A spread that puts some sequences and some tokens outside their clip ranges.
    spread = 0.02 * torch.randn(NUM_RESPONSES, TOKENS, generator=generator)
    current = old + spread + 3e-4 * torch.randn(NUM_RESPONSES, 1, generator=generator)
    advantages = torch.randn(NUM_RESPONSES, generator=generator)
    for objective in ("gspo", "grpo"):
        measure_objective(bench, objective, current, old, advantages)
    bench.profile(partial(gradient, partial(ours, "gspo"), current, old, advantages))


def measure_objective(bench: Bench, objective: str, current: Tensor, old: Tensor, advantages: Tensor) -> None:
    sides: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "ours": partial(ours, objective),
        "TRL": partial(trls, objective),
        "verl": partial(verls, objective),
    }
    gradients = {name: gradient(side, current, old, advantages) for name, side in sides.items()}
    for peer in ("TRL", "verl"):
        bench.same(f"{objective}: gradient beside {peer}'s", gradients["ours"], gradients[peer], tolerance=1e-4)
    if objective == "gspo":
        compiled = torch.compile(few_lines_of_gspo)
        sides["compiled"] = lambda *inputs: compiled(*inputs)[0]
        bench.same(
            "gspo: gradient beside the compiled one's",
            gradients["ours"],
            gradient(sides["compiled"], current, old, advantages),
            tolerance=1e-4,
        )
    runs = {name: partial(repeat, partial(gradient, side, current, old, advantages)) for name, side in sides.items()}
    runs["floor"] = partial(repeat, copy_probe(8 * current.numel()))  # reads 8 bytes a token and writes 8
    runs["difference"] = partial(repeat, lambda: current - old)
    runs["autograd"] = partial(
        repeat, partial(gradient, lambda log_probs, *_: _Nothing.apply(log_probs), current, old, advantages)
    )
    times = bench.alternate(runs, rounds=4 * bench.rounds)
    for peer in ("TRL", "verl"):
        aim = 1.0 if objective == "gspo" else None
        bench.figure(f"{objective}: {peer}'s time / ours", times.ratio(peer, "ours"), better="higher", aim=aim)
    bench.figure(
        f"{objective}: our time / copying 16 bytes a token",
        times.ratio("ours", "floor"),
        better="lower",
        aim=1.3 if objective == "gspo" else None,
    )
    if objective == "gspo":
        name = "gspo: fused by torch.compile, its time / copying 16 bytes a token"
        bench.figure(name, times.ratio("compiled", "floor"), better="lower")
        name = "gspo: the difference of log-probs alone / copying 16 bytes a token"
        bench.figure(name, times.ratio("difference", "floor"), better="lower")
        name = "gspo: autograd alone, with nothing computed / copying 16 bytes a token"
        bench.figure(name, times.ratio("autograd", "floor"), better="lower")


def repeat(function: Callable[[], object]) -> None:
    for _ in range(CALLS):
        function()


def gradient(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], current: Tensor, old: Tensor, advantages: Tensor
) -> Tensor:
    """The gradient of the loss with respect to the log-probs, [N, tokens]."""
    log_probs = current.detach().requires_grad_()
    loss(log_probs, old, advantages).backward()
    assert log_probs.grad is not None
    return log_probs.grad


def ours(objective: str, log_probs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    cu_seqlens = torch.arange(len(advantages) + 1) * log_probs.shape[1]
    return policy_loss(objective, log_probs.flatten(), old.flatten(), advantages, cu_seqlens).loss


def few_lines_of_gspo(log_probs: Tensor, old: Tensor, advantages: Tensor) -> tuple[Tensor, ...]:
    """The loss by eqs. 6 and 8, then what we measure beside it; without our checks and options."""
    low, high = clip_range("gspo")
    log_ratios = log_probs - old
    means = log_ratios.mean(dim=1)
    lower = torch.where(advantages < 0, math.log1p(-low), -math.inf)
    upper = torch.where(advantages > 0, math.log1p(high), math.inf)
    loss = -(means.clamp(lower, upper).exp() * advantages).mean()
    tokens, responses, weights = log_ratios.detach(), means.detach(), means.detach().exp()
    return (
        loss,
        *(moment for values in (tokens, responses, weights) for moment in (values.sum(), values.square().sum())),
        *(values.abs().max() for values in (tokens, responses)),
        *((responses < lower).sum(), (responses > upper).sum()),
    )


class _Nothing(torch.autograd.Function):
    """A loss of nothing: what a call of autograd and its backward pass take whatever is between them."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor) -> Tensor:
        return log_probs.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.new_empty(NUM_RESPONSES, TOKENS)


def clip_range(objective: str) -> tuple[float, float]:
    return OBJECTIVES[objective].clip_low, OBJECTIVES[objective].clip_high


def trls(objective: str, log_probs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    low, high = clip_range(objective)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, log_probs.detach(), None),
        importance_sampling_level="sequence" if objective == "gspo" else "token",
        epsilon_low=low,
        epsilon_high=high,
        loss_type="grpo",
        beta=0.0,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        args=SimpleNamespace(delta=None),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(reduce=lambda x, **_: x, gather=lambda x: x),
        _metrics={"train": _Lists()},
    )
    mask = MASKS.setdefault(log_probs.shape, torch.ones(log_probs.shape, dtype=torch.int64))
    inputs = {
        "prompt_ids": mask[:, :1],
        "prompt_mask": mask[:, :1],
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old,
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


class _Lists(dict[str, list[float]]):
    def __missing__(self, key: str) -> list[float]:
        return self.setdefault(key, [])


MASKS: dict[Any, Tensor] = {}
ACTOR = partial(ActorConfig, strategy="fsdp", ppo_micro_batch_size_per_gpu=1, rollout_n=8)


def verls(objective: str, log_probs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    low, high = clip_range(objective)
    function = compute_policy_loss_gspo if objective == "gspo" else compute_policy_loss_vanilla
    mask = MASKS.setdefault(log_probs.shape, torch.ones(log_probs.shape, dtype=torch.int64))
    loss, _ = function(
        old,
        log_probs,
        advantages[:, None].expand_as(log_probs),
        mask,
        "seq-mean-token-mean",
        # The dual clip cannot be left out of verl's vanilla loss; this one is never reached.
        ACTOR(clip_ratio_low=low, clip_ratio_high=high, clip_ratio_c=1e6),
    )
    return loss
