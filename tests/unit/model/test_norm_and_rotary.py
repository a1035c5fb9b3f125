"""The norm and the rotary positions of models without Transformer Engine, both passes written out, beside plain formulas."""

import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from torch import Tensor

from megatron_gspo.model.norm import rms_norm_on_cpu
from megatron_gspo.model.rotary import RotaryTable

INVERSE_FREQUENCIES = 10000.0 ** -(torch.arange(0, 8, 2, dtype=torch.float32) / 8)
POSITIONS = torch.tensor([0, 1, 2, 0, 1, 0, 3000])


def test_the_norms_gradient_is_that_of_its_formula():
    torch.manual_seed(0)
    x = torch.randn(5, 3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(
        rms_norm_on_cpu(x, weight, 1e-2), x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt() * weight
    )
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm_on_cpu(x, weight, 1e-2), (x, weight))


def test_the_norm_of_a_strided_view_is_that_of_its_copy():
    # Keys are a view of queries, keys and values in one tensor.
    joined = torch.randn(6, 4, 24, requires_grad=True)
    weight = torch.randn(8, requires_grad=True)
    view = joined[..., 8:16]
    upstream = torch.randn(8, 4, 6).permute(2, 1, 0)
    found = torch.autograd.grad(rms_norm_on_cpu(view, weight, 1e-6), (joined, weight), upstream)
    expected = torch.autograd.grad(torch.nn.functional.rms_norm(view, (8,), weight, 1e-6), (joined, weight), upstream)
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other)


def rotated_by_megatron(heads: Tensor) -> Tensor:
    angles = torch.outer(POSITIONS.float(), INVERSE_FREQUENCIES)
    return _apply_rotary_pos_emb_bshd(heads.unsqueeze(1), torch.cat([angles, angles], -1)[:, None, None]).squeeze(1)


def test_tokens_are_rotated_as_megatron_rotates_them_one_by_one():
    heads = torch.randn(len(POSITIONS), 3, 8)
    table = RotaryTable.of(POSITIONS, INVERSE_FREQUENCIES, torch.float32)
    torch.testing.assert_close(table.rotate(heads), rotated_by_megatron(heads), rtol=0, atol=1e-6)


def test_the_rotations_gradient_is_the_rotation_back():
    heads = torch.randn(len(POSITIONS), 3, 8, dtype=torch.float64, requires_grad=True)
    table = RotaryTable.of(POSITIONS, INVERSE_FREQUENCIES, torch.float64)
    assert torch.autograd.gradcheck(table.rotate, (heads,))
    (gradient,) = torch.autograd.grad(table.rotate(heads), heads, table.rotate(heads).detach())
    torch.testing.assert_close(gradient, heads.detach(), rtol=1e-6, atol=1e-6)
