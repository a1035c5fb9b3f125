"""The policy loss, forward and backward, of 64 responses × 4,096 tokens, beside TRL's and verl's on the same tensors.

Each side returns its loss with its own metrics, as its trainer calls it; losses and gradients are held to each other.
TRL's is the loss method of its GRPOTrainer, handed log-probs instead of a model. Settings, masks and bounds of
responses are made once, outside of what is timed. The floor reads and writes 16 bytes a token: two log-probs in, a
gradient out, and one more. For GSPO two more measures of how near it one can come: all of it in one function of C++; and
autograd alone, a function that computes nothing and hands back memory that nobody has written.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.cpp_extension import load
from trl import GRPOTrainer
from verl.trainer.ppo.core_algos import compute_policy_loss_gspo, compute_policy_loss_vanilla
from verl.workers.config import ActorConfig

from megatron_gspo.policy_loss import OBJECTIVES, policy_loss
from tools.bench.harness import Bench, copy_probe

NUM_RESPONSES, TOKENS = 64, 4096
CALLS = 5  # a turn: one takes about a millisecond
KERNEL = Path(__file__).with_name("gspo_kernel.cpp")

#: Log-probs [N, tokens], those of the old policy, and advantages [N] to a loss, 0-d
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


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
    bench.profile(partial(differentiate, ours("gspo"), current, old, advantages))


def measure_objective(bench: Bench, objective: str, current: Tensor, old: Tensor, advantages: Tensor) -> None:
    sides = {"ours": ours(objective), "TRL": trls(objective), "verl": verls(objective)}
    if objective == "gspo":
        with tempfile.TemporaryDirectory() as directory:  # what is loaded outlives its file
            sides["native code"] = native(Path(directory))
    check_same(bench, objective, sides, current, old, advantages)
    calls: dict[str, Callable[[], object]] = {
        name: partial(differentiate, side, current, old, advantages) for name, side in sides.items()
    }
    calls["floor"] = copy_probe(8 * current.numel())  # reads 8 bytes a token and writes 8
    if objective == "gspo":
        calls["autograd"] = partial(
            differentiate, lambda log_probs, *_: _Nothing.apply(log_probs), current, old, advantages
        )
    runs = {name: partial(repeat, call) for name, call in calls.items()}
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
        name = "gspo: one function of native code, its time / copying 16 bytes a token"
        bench.figure(name, times.ratio("native code", "floor"), better="lower")
        name = "gspo: autograd alone, with nothing computed / copying 16 bytes a token"
        bench.figure(name, times.ratio("autograd", "floor"), better="lower")


def check_same(
    bench: Bench, objective: str, sides: dict[str, Loss], current: Tensor, old: Tensor, advantages: Tensor
) -> None:
    """Our loss and gradient beside every other side's: all minimise the same mean over responses."""
    found = {name: differentiate(side, current, old, advantages) for name, side in sides.items()}
    for name in (name for name in sides if name != "ours"):
        for what, ours_is, theirs_is in zip(("loss", "gradient"), found["ours"], found[name], strict=True):
            bench.same(f"{objective}: {what} beside that of {name}", ours_is, theirs_is, tolerance=1e-4)


def repeat(function: Callable[[], object]) -> None:
    for _ in range(CALLS):
        function()


def differentiate(loss: Loss, current: Tensor, old: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, 0-d, detached, and its gradient with respect to the log-probs, [N, tokens]."""
    log_probs = current.detach().requires_grad_()
    value = loss(log_probs, old, advantages)
    value.backward()
    assert log_probs.grad is not None
    return value.detach(), log_probs.grad


def ours(objective: str) -> Loss:
    """This project's."""
    cu_seqlens = torch.arange(NUM_RESPONSES + 1) * TOKENS

    def loss(log_probs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        return policy_loss(objective, log_probs.flatten(), old.flatten(), advantages, cu_seqlens).loss

    return loss


def native(directory: Path) -> Loss:
    """GSPO in one function of C++, autograd's part included (`gspo_kernel.cpp`), compiled in `directory`."""
    # PyTorch's build of extensions looks for Ninja on the path, and a virtual environment may have it.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    flags = ["-O3", "-march=native", "-fno-math-errno"]
    module = load("gspo_kernel", str(KERNEL), extra_cflags=flags, build_directory=str(directory))
    low, high = clip_range("gspo")
    bounds = math.log1p(-low), math.log1p(high)
    cu_seqlens = torch.arange(NUM_RESPONSES + 1) * TOKENS

    def loss(log_probs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        measured = torch.empty(5, dtype=torch.float64)
        return module.gspo(log_probs.flatten(), old.flatten(), advantages, cu_seqlens, *bounds, measured)

    return loss


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


def trls(objective: str) -> Loss:
    """The loss method of TRL's GRPOTrainer, called on an object that has what the method asks its trainer for."""
    low, high = clip_range(objective)
    trainer = SimpleNamespace(
        # Log-probs come in the model's place: kept by the trainer, the last call's would stay in memory for the next.
        _get_per_token_logps_and_entropies=lambda log_probs, *_, **__: (log_probs, log_probs.detach(), None),
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
    mask = full_mask()
    ids = {"prompt_ids": mask[:, :1], "prompt_mask": mask[:, :1], "completion_ids": mask, "completion_mask": mask}

    def loss(log_probs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        inputs = ids | {"advantages": advantages, "old_per_token_logps": old}
        return GRPOTrainer._compute_loss(trainer, log_probs, inputs)

    return loss


class _Lists(dict[str, list[float]]):
    def __missing__(self, key: str) -> list[float]:
        return self.setdefault(key, [])


def verls(objective: str) -> Loss:
    """verl's function of the objective."""
    low, high = clip_range(objective)
    function = compute_policy_loss_gspo if objective == "gspo" else compute_policy_loss_vanilla
    config = ActorConfig(
        strategy="fsdp",
        ppo_micro_batch_size_per_gpu=1,
        rollout_n=8,
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=1e6,  # the dual clip cannot be left out of verl's vanilla loss; this one is never reached
    )
    mask = full_mask()

    def loss(log_probs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        of_tokens = advantages[:, None].expand_as(log_probs)
        return function(old, log_probs, of_tokens, mask, "seq-mean-token-mean", config)[0]

    return loss


def full_mask() -> Tensor:
    """[N, tokens] int64: every token is a response's, as TRL's and verl's trainers have their masks."""
    return torch.ones(NUM_RESPONSES, TOKENS, dtype=torch.int64)
