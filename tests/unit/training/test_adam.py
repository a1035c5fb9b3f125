"""The optimizer that keeps `step` in the group makes the updates of PyTorch's fused one, bit for bit."""

import pytest
import torch

from megatron_gspo.training.adam import AdamWithGroupStep


@pytest.mark.parametrize("decoupled", [True, False])
def test_updates_are_those_of_pytorch(decoupled: bool):
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(shape, generator=generator) for shape in ((5,), (3, 4))]
    ours = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    theirs = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    options = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    adam = AdamWithGroupStep([{"params": ours}], adam_w_mode=decoupled, **options)
    reference = (torch.optim.AdamW if decoupled else torch.optim.Adam)([{"params": theirs}], fused=True, **options)
    for _ in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        adam.step()
        reference.step()
    assert adam.param_groups[0]["step"] == 4
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
        assert torch.equal(adam.state[mine]["exp_avg_sq"], reference.state[other]["exp_avg_sq"])


def test_the_count_of_updates_is_in_the_group_and_not_in_the_state():
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    adam = AdamWithGroupStep([parameter])
    adam.step()
    saved = adam.state_dict()
    assert saved["param_groups"][0]["step"] == 1
    assert set(saved["state"][0]) == {"exp_avg", "exp_avg_sq"}
