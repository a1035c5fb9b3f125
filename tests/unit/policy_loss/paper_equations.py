"""The paper's equations a second time: loops over responses and tokens in Python floats, no autograd, no packing.

`reference` returns value, gradient and clipped tokens of an objective as written in eqs. 2, 3, 6, 8, 11, 13, 14, 15
and 17; tests hold the package to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_gspo.policy_loss import PolicyLossOutput


@dataclass(frozen=True)
class Case:
    """Packed responses in float64, with advantages of both signs."""

    log_probs: torch.Tensor  # [T], a leaf that wants a gradient
    old_log_probs: torch.Tensor  # [T]
    advantages: torch.Tensor  # [N], or [T] where a test sets them
    lengths: tuple[int, ...]

    @property
    def cu_seqlens(self) -> torch.Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0)

    def arguments(self) -> tuple[torch.Tensor, ...]:
        return self.log_probs, self.old_log_probs, self.advantages, self.cu_seqlens

    def select(self, responses: list[int]) -> Case:
        """The same responses in another order or fewer; tokens stay connected to this case's log-probs."""
        pieces = [slice(int(start), int(end)) for start, end in zip(self.cu_seqlens, self.cu_seqlens[1:], strict=False)]

        def pick(values: torch.Tensor) -> torch.Tensor:
            return torch.cat([values[:0], *(values[pieces[index]] for index in responses)])

        one_a_response = len(self.advantages) == len(self.lengths)
        advantages = (
            self.advantages[torch.tensor(responses, dtype=torch.long)] if one_a_response else pick(self.advantages)
        )
        return Case(
            pick(self.log_probs),
            pick(self.old_log_probs),
            advantages,
            tuple(self.lengths[index] for index in responses),
        )


def make_case(lengths: tuple[int, ...], *, spread: float, seed: int = 0, token_advantages: bool = False) -> Case:
    """Responses whose token log-ratios have standard deviation `spread`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    num_tokens = sum(lengths)
    old_log_probs = -normal(num_tokens).abs() - 0.1
    log_probs = (old_log_probs + spread * normal(num_tokens)).requires_grad_()
    return Case(log_probs, old_log_probs, normal(num_tokens if token_advantages else len(lengths)), lengths)


@dataclass(frozen=True)
class Reference:
    loss: float
    gradient: list[float]  # [T], of the loss with respect to each token's log-prob
    clipped: list[bool]  # [T]


def reference(
    objective: str,
    case: Case,
    low: float,
    high: float,
    *,
    dual: float = math.inf,
    weights: list[float] | None = None,
    importance: list[float] | None = None,
) -> Reference:
    """Loop over responses and tokens. `weights` [N] are those of a response's token mean; default 1 / N (the paper's).

    `importance` [T] multiplies what each token adds; default 1.
    """
    loss, gradient, clipped = 0.0, [], []
    weights = weights or [1 / len(case.lengths)] * len(case.lengths)
    token = 0
    for response, length in enumerate(case.lengths):
        tokens = range(token, token + length)
        token += length
        token_logs = [(case.log_probs[t] - case.old_log_probs[t]).item() for t in tokens]
        sequence_ratio = math.exp(math.fsum(token_logs) / length)
        for position, t in enumerate(tokens):
            ratio = math.exp(token_logs[position]) if objective == "grpo" else sequence_ratio
            one_a_response = len(case.advantages) == len(case.lengths)
            advantage = float(case.advantages[response if one_a_response else t])
            value = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
            if advantage < 0:
                value = max(value, dual * advantage)
            too_high = ratio > 1 + high if advantage > 0 else ratio > dual
            too_low = advantage < 0 and ratio < 1 - low
            is_clipped = advantage != 0 and (too_high or too_low)
            clipped.append(is_clipped)
            share = weights[response] / length * (importance[t] if importance else 1.0)
            loss -= share * value
            gradient.append(0.0 if is_clipped else -share * ratio * advantage)
    return Reference(loss, gradient, clipped)


def totals(outputs: list[PolicyLossOutput]) -> dict[str, tuple[float, float]]:
    """Add up the (sum, count) pairs of several micro-batches, as the training loop does."""
    names = outputs[0].metrics
    return {
        name: (
            sum(float(output.metrics[name][0]) for output in outputs),
            sum(float(output.metrics[name][1]) for output in outputs),
        )
        for name in names
    }
