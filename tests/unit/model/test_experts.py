"""Grouped experts compute what Megatron's loop over experts computes."""

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP

from megatron_gspo.config import ParallelSection
from megatron_gspo.model.build import transformer_config
from megatron_gspo.model.experts import GroupedExperts
from tests.tiny_models import model_section, moe_config


def both(num_experts: int, **model: str) -> tuple[GroupedExperts, SequentialMLP]:
    """The same random experts, grouped and looped over."""
    config = transformer_config(moe_config(), model_section(**model), ParallelSection())
    groups = ProcessGroupCollection.use_mpu_process_groups()
    grouped = GroupedExperts(num_experts, config, pg_collection=groups)
    submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    looped = SequentialMLP(num_experts, config, submodules, pg_collection=groups)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for index, expert in enumerate(looped.local_experts):
            for weight, stacked in (
                (expert.linear_fc1.weight, grouped.weight1),
                (expert.linear_fc2.weight, grouped.weight2),
            ):
                weight.normal_(std=0.3, generator=generator)
                stacked[index] = weight
    return grouped, looped


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize(
    "tokens_per_expert", [(3, 5, 1, 7), (0, 9, 0, 0), (4, 0, 0, 1)], ids=["all used", "one used", "some unused"]
)
def test_outputs_and_gradients_equal_megatrons_loop_over_experts(tokens_per_expert: tuple[int, ...], recompute: str):
    grouped, looped = both(len(tokens_per_expert), recompute=recompute)
    counts = torch.tensor(tokens_per_expert)
    hidden, probs = torch.randn(int(counts.sum()), 32), torch.rand(int(counts.sum()))
    upstream = torch.randn_like(hidden)
    results = []
    for module in (grouped, looped):
        inputs = hidden.clone().requires_grad_(), probs.clone().requires_grad_()
        output, bias = module(inputs[0], counts, inputs[1])
        assert bias is None
        output.backward(upstream)
        results.append((output, inputs[0].grad, inputs[1].grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for index, expert in enumerate(looped.local_experts):
        for stacked, weight in (
            (grouped.weight1, expert.linear_fc1.weight),
            (grouped.weight2, expert.linear_fc2.weight),
        ):
            expected = torch.zeros_like(weight) if weight.grad is None else weight.grad
            torch.testing.assert_close(stacked.grad[index], expected, rtol=1e-5, atol=1e-6)


def test_without_tokens_every_weight_gets_a_gradient_of_zero():
    grouped, _ = both(4)
    hidden = torch.zeros(0, 32, requires_grad=True)
    output, _ = grouped(hidden, torch.zeros(4, dtype=torch.long), torch.zeros(0))
    assert output.shape == (0, 32)
    output.sum().backward()
    assert not grouped.weight1.grad.any() and not grouped.weight2.grad.any()


def test_checkpoints_are_interchangeable_with_megatrons_loop_over_experts():
    """Same keys, same global shapes, same values in the same places."""
    grouped, looped = both(8)
    pieces: dict[str, torch.Tensor] = {}
    for factory in grouped.sharded_state_dict("mlp.experts.").values():
        for piece in factory.build():
            rows = slice(piece.global_offset[1], piece.global_offset[1] + piece.local_shape[1])
            pieces.setdefault(piece.key, torch.full(piece.global_shape, torch.nan))[:, rows] = piece.data
        merged = factory.merge_fn([piece.data for piece in factory.build()])
        assert torch.equal(merged, factory.data)
    seen = set()
    for entry in looped.sharded_state_dict("mlp.experts.").values():
        for piece in entry.build() if hasattr(entry, "build") else [entry]:
            if piece.key not in pieces:
                assert piece.key.endswith("_extra_state")
                continue
            seen.add(piece.key)
            assert piece.global_shape == tuple(pieces[piece.key].shape)
            place = tuple(
                slice(start, start + size)
                for start, size in zip(piece.global_offset, (1, *piece.local_shape), strict=True)
            )
            assert torch.equal(pieces[piece.key][place].squeeze(0), piece.data)
    assert seen == set(pieces)
