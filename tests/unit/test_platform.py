"""Where there is no CUDA, Megatron-Core runs on the CPU and nothing else notices."""

import types
import typing

import pytest
import torch

from megatron_gspo.platform import detect_machine, device, prepare_megatron

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these stand-ins exist only without CUDA")


@pytest.fixture(autouse=True)
def _prepared() -> None:
    prepare_megatron()
    prepare_megatron()


def test_the_machine_says_what_will_be_used():
    machine = detect_machine()
    assert not machine.has_cuda and machine.backend == "gloo"
    assert machine.num_cores >= 1 and machine.memory_gib > 0
    assert device() == torch.device("cpu")


def test_a_stream_can_stand_in_a_type_annotation():
    assert isinstance(torch.cuda.Stream | None, types.UnionType)
    assert torch.cuda.Stream in typing.get_args(torch.cuda.Stream | None)


def test_megatron_leaves_its_functions_uncompiled_and_torch_its_compiler():
    from megatron.core import jit

    def twice(number: int) -> int:
        return 2 * number

    assert jit.jit_fuser(twice) is twice
    assert torch.compile.__module__ == "torch"
    assert torch.compile is not jit.jit_fuser


def test_megatron_modules_that_name_cuda_get_the_cpu_and_all_others_are_left_alone():
    from megatron.core.optimizer import clip_grads

    assert clip_grads.torch.zeros(1, device="cuda").device.type == "cpu"
    assert clip_grads.torch.zeros(1, device="meta").device.type == "meta"
    assert clip_grads.torch.Tensor is torch.Tensor
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


def test_conversions_by_type_name_still_convert():
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64


def test_gradient_norms_and_clipping_run_without_a_gpu():
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, get_grad_norm_fp32

    from megatron_gspo import parallel

    parallel.initialize_distributed()
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    norm = get_grad_norm_fp32([parameter.grad], grad_stats_parallel_group=torch.distributed.group.WORLD)
    assert norm == pytest.approx(5.0)
    clip_grad_by_total_norm_fp32([parameter], max_norm=1.0, total_norm=norm)
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]))
