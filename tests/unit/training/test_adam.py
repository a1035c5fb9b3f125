"""The optimizer that keeps `step` in the group makes the updates of PyTorch's fused one, bit for bit."""

import pytest
import torch

from megatron_gspo.training.adam import AdamWithGroupStep


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("decoupled", [True, False])
def test_updates_are_those_of_pytorch(decoupled: bool, fused: bool):
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(shape, generator=generator) for shape in ((5,), (3, 4))]
    ours = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    theirs = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    options = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    adam = AdamWithGroupStep([{"params": ours}], adam_w_mode=decoupled, **options)
    reference = (torch.optim.AdamW if decoupled else torch.optim.Adam)([{"params": theirs}], fused=fused, **options)
    for _ in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        adam.step()
        reference.step()
    assert adam.param_groups[0]["step"] == 4
    for mine, other in zip(ours, theirs, strict=True):
        tolerance = {"rtol": 0, "atol": 0} if fused else {}  # the other form rounds differently
        torch.testing.assert_close(mine, other, **tolerance)
        ours_sq, theirs_sq = adam.state[mine]["exp_avg_sq"], reference.state[other]["exp_avg_sq"]
        torch.testing.assert_close(ours_sq, theirs_sq, **tolerance)


def test_an_update_takes_no_memory_of_a_parameters_size():
    parameter = torch.nn.Parameter(torch.ones(2**18))
    adam = AdamWithGroupStep([parameter])
    parameter.grad = torch.ones_like(parameter)
    adam.step()  # makes the moments
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        adam.step()
    events = profile.profiler.kineto_results.events()
    allocated = sum(max(0, event.nbytes()) for event in events if event.name() == "[memory]")
    assert 0 < allocated < parameter.nbytes / 100


def test_the_count_of_updates_is_in_the_group_and_not_in_the_state():
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    adam = AdamWithGroupStep([parameter])
    adam.step()
    saved = adam.state_dict()
    assert saved["param_groups"][0]["step"] == 1
    assert set(saved["state"][0]) == {"exp_avg", "exp_avg_sq"}
