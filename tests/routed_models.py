"""Tiny MoE policies, passes over them, and what their routers really did, seen without the tap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Qwen3MoeConfig

from megatron_gspo.config import ParallelSection
from megatron_gspo.model.build import build_policy
from megatron_gspo.model.hf_weights import initialize_weights
from megatron_gspo.model.policy import PolicyModel, TokenLogProbs
from megatron_gspo.types import MicroBatch
from tests.tiny_models import micro_batch, model_section, moe_config, sequences

#: Sequence lengths of the micro-batches that most tests use: of different sizes, one with padding.
LENGTHS = ((9, 5), (4, 11, 3), (7, 6))


def policy_model(config: Qwen3MoeConfig | None = None, *, seed: int = 5, **model: Any) -> PolicyModel:
    """A policy with random weights in one piece; the same for the same arguments."""
    (policy,) = build_policy(config or moe_config(), model_section(**model), ParallelSection())
    initialize_weights([policy], seed=seed, initializer_range=0.2)
    return policy


def micro_batches(pad_to_multiple: int = 4) -> list[MicroBatch]:
    return [
        micro_batch(sequences(lengths, seed=number), pad_to_multiple=pad_to_multiple)
        for number, lengths in enumerate(LENGTHS)
    ]


def update(policies: Sequence[torch.nn.Module], size: float = 0.05) -> None:
    """Change every weight, the same way for the same model."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for policy in policies:
            for parameter in policy.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)


def loss_of(output: TokenLogProbs) -> torch.Tensor:
    weights = torch.linspace(-1, 1, len(output.log_probs))
    assert output.entropy is not None
    return (weights * output.log_probs).sum() + 0.1 * output.entropy.sum()


def forward(policy: PolicyModel, batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
    """Log-probs of every micro-batch, without gradient."""
    with torch.no_grad():
        return [policy(batch).log_probs for batch in batches]


def forward_and_backward(policy: PolicyModel, batches: Sequence[MicroBatch]) -> dict[str, torch.Tensor]:
    """Log-probs of every micro-batch and the gradient of every weight."""
    policy.zero_grad()
    found = {}
    for number, batch in enumerate(batches):
        output = policy(batch)
        loss_of(output).backward()
        found[f"log-probs {number}"] = output.log_probs.detach()
    return found | {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}


def assert_bit_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not different


@contextmanager
def watched_routers(*chunks: PolicyModel) -> Iterator[list[tuple[int, torch.Tensor]]]:
    """Every call of a router inside the block: its layer's number, and the experts [S, K] its routing map activates."""
    calls: list[tuple[int, torch.Tensor]] = []

    def watch(layer_number: int) -> Any:
        def after_router(module: Any, args: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            del module, args
            routing_map = output[1]
            calls.append((layer_number, routing_map.nonzero()[:, 1].view(len(routing_map), -1)))

        return after_router

    layers = [layer for chunk in chunks for layer in chunk.decoder.layers if layer.is_moe_layer]
    hooks = [layer.mlp.router.register_forward_hook(watch(layer.layer_number)) for layer in layers]
    yield calls
    for hook in hooks:
        hook.remove()


def as_sets(experts: torch.Tensor) -> torch.Tensor:
    """Routes [..., K] as int64, each token's experts in ascending order."""
    return experts.long().sort(-1).values
