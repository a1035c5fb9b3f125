"""AdamW that keeps its count of updates where NVIDIA's fused Adam keeps it, for machines without that one.

In: parameters in groups. Out: the update of `torch.optim.AdamW(fused=True)`, with `step` a number of the group. PyTorch
keeps `step` by parameter, which Megatron-Core 0.16.1 cannot save in a checkpoint that other parallel layouts can load
(optimizer/distrib_optimizer.py: KeyError 'step' while loading `fully_reshardable`). With Transformer Engine or Apex,
Megatron takes their FusedAdam and nothing here is used; what a checkpoint holds is the same either way.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adam import adam


class AdamWithGroupStep(torch.optim.Optimizer):
    """Adam (Kingma & Ba) with decoupled weight decay where `adam_w_mode`; the arguments are FusedAdam's."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._decoupled_weight_decay = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; `closure` is not supported."""
        assert closure is None, "Megatron's optimizers pass none"
        for group in self.param_groups:
            num_updates_before = group.get("step", 0)
            group["step"] = num_updates_before + 1
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            states = [self._state_of(parameter) for parameter in parameters]
            beta1, beta2 = group["betas"]
            adam(
                parameters,
                [parameter.grad for parameter in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                max_exp_avg_sqs=[],
                # PyTorch counts each of these up by itself; a GPU's kernel wants them there, and reads float32 unasked.
                state_steps=[
                    torch.full((), float(num_updates_before), dtype=torch.float32, device=each.device)
                    for each in parameters
                ],
                # One pass in place. Its other forms make temporaries as large as a parameter, on a GPU as all of them.
                fused=True,
                decoupled_weight_decay=self._decoupled_weight_decay,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def _state_of(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


@functools.cache
def register_adam() -> None:
    """Have Megatron build `AdamWithGroupStep`, where it found neither Transformer Engine nor Apex. Again is harmless.

    It is registered under the name, and with the flags, that FusedAdam goes by: Megatron then reads and writes `step` in
    the group. The flags decide nothing else in these two modules.
    """
    optimizer: Any = importlib.import_module("megatron.core.optimizer")
    distributed: Any = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    # optimizer/__init__.py: which class is built, and with which arguments
    optimizer.Adam = AdamWithGroupStep
    optimizer.USING_PYTORCH_OPTIMIZER = False
    # optimizer/distrib_optimizer.py: where `step` is
    distributed.Adam = AdamWithGroupStep
    distributed.HAVE_APEX_OR_TE = True
    distributed.USING_TE_OPTIMIZER = True
