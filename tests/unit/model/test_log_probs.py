"""Chunked log-probs and entropies, held against the naive computation that forms every logit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from megatron_gspo.model.log_probs import token_log_probs


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies by autograd through the full [T, V] matrix."""
    log_p = (hidden @ weight.t() / temperature).log_softmax(dim=-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(dim=-1)


def problem(
    num_tokens: int, vocabulary: int = 50, hidden_size: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, hidden_size, generator=generator) * 0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (num_tokens,), generator=generator)


def gradients(outputs: tuple[Tensor, Tensor], inputs: tuple[Tensor, Tensor], seed: int = 1) -> tuple[Tensor, ...]:
    """Gradients of a fixed random combination of all log-probs and entropies."""
    generator = torch.Generator().manual_seed(seed)
    total = sum((torch.randn(o.shape, generator=generator).to(o.dtype) * o).sum() for o in outputs)
    return torch.autograd.grad(total, inputs)  # type: ignore[arg-type]


@given(num_tokens=st.integers(1, 23), chunk_tokens=st.integers(1, 25), temperature=st.sampled_from([0.3, 1.0, 1.7]))
@settings(max_examples=30, deadline=None)
def test_values_and_gradients_equal_the_naive_ones_however_tokens_are_cut_into_chunks(
    num_tokens: int, chunk_tokens: int, temperature: float
) -> None:
    hidden, weight, targets = problem(num_tokens)
    chunked = token_log_probs(hidden, weight, targets, temperature=temperature, chunk_tokens=chunk_tokens)
    expected = naive(hidden, weight, targets, temperature)
    torch.testing.assert_close(chunked, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        gradients(chunked, (hidden, weight)), gradients(expected, (hidden, weight)), rtol=1e-5, atol=2e-5
    )


@pytest.mark.parametrize("output", ["log_probs", "entropy", "both"])
def test_gradients_equal_finite_differences_in_float64(output: str) -> None:
    hidden, weight, targets = problem(5, vocabulary=7, hidden_size=4, dtype=torch.float64)

    def outputs(hidden: Tensor, weight: Tensor) -> Any:
        log_probs, entropy = token_log_probs(hidden, weight, targets, temperature=0.8, chunk_tokens=2)
        return {"log_probs": log_probs, "entropy": entropy, "both": (log_probs, entropy)}[output]

    assert torch.autograd.gradcheck(outputs, (hidden, weight))


def test_entropy_gradient_is_not_dropped_when_it_is_the_only_one() -> None:
    hidden, weight, targets = problem(9)
    _, entropy = token_log_probs(hidden, weight, targets, chunk_tokens=4)
    assert entropy is not None
    expected = torch.autograd.grad(naive(hidden, weight, targets)[1].sum(), (hidden, weight))
    assert all(gradient.abs().max() > 0.01 for gradient in expected)
    torch.testing.assert_close(torch.autograd.grad(entropy.sum(), (hidden, weight)), expected, rtol=1e-5, atol=1e-5)


def test_without_entropy_the_log_probs_and_their_gradients_stay_the_same() -> None:
    hidden, weight, targets = problem(9)
    log_probs, entropy = token_log_probs(hidden, weight, targets, with_entropy=False)
    assert entropy is None
    expected = naive(hidden, weight, targets)[0]
    torch.testing.assert_close(log_probs, expected)
    torch.testing.assert_close(
        torch.autograd.grad(log_probs.sum(), (hidden, weight)),
        torch.autograd.grad(expected.sum(), (hidden, weight)),
        rtol=1e-5,
        atol=1e-5,
    )


def test_bfloat16_input_gives_float32_results_of_the_same_numbers() -> None:
    hidden, weight, targets = problem(13, dtype=torch.bfloat16)
    log_probs, entropy = token_log_probs(hidden, weight, targets, chunk_tokens=5)
    assert entropy is not None
    assert log_probs.dtype == entropy.dtype == torch.float32

    exact_inputs = tuple(x.detach().double().requires_grad_() for x in (hidden, weight))
    expected = naive(*exact_inputs, targets)
    torch.testing.assert_close((log_probs.double(), entropy.double()), expected, rtol=1e-5, atol=1e-5)
    actual = gradients((log_probs, entropy), (hidden, weight))
    assert all(gradient.dtype == torch.bfloat16 for gradient in actual)
    # Only the last rounding to bfloat16 (8 bits) separates the gradients.
    for gradient, exact in zip(actual, gradients(expected, exact_inputs), strict=True):
        torch.testing.assert_close(gradient.double(), exact, rtol=2**-8, atol=1e-4)


def test_extreme_logits_stay_finite() -> None:
    hidden, weight, targets = problem(6)
    log_probs, entropy = token_log_probs(hidden * 1e4, weight, targets)
    assert entropy is not None
    gradient = torch.autograd.grad((log_probs + entropy).sum(), hidden)[0]
    assert log_probs.isfinite().all()
    assert entropy.isfinite().all()
    assert gradient.isfinite().all()


def test_no_tokens_give_empty_results_connected_to_the_graph() -> None:
    hidden, weight, targets = problem(0)
    log_probs, entropy = token_log_probs(hidden, weight, targets)
    assert entropy is not None
    assert log_probs.shape == entropy.shape == (0,)
    (log_probs.sum() + entropy.sum()).backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 16)
    assert weight.grad is not None
    assert not weight.grad.any()


def test_padding_rows_have_no_probability_and_no_gradient() -> None:
    hidden, weight, targets = problem(11, vocabulary=40)
    padded = torch.cat([weight.detach(), torch.full((24, 16), 3.0)]).requires_grad_()
    actual = token_log_probs(hidden, padded, targets, vocabulary_size=40)
    expected = naive(hidden, weight, targets)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    grad_padded = gradients(actual, (hidden, padded))[1]
    torch.testing.assert_close(grad_padded[:40], gradients(expected, (hidden, weight))[1], rtol=1e-5, atol=2e-5)
    assert not grad_padded[40:].any()


@pytest.mark.parametrize("target", [-1, 50])
def test_target_outside_the_vocabulary_is_refused(target: int) -> None:
    hidden, weight, targets = problem(3)
    targets[1] = target
    with pytest.raises(AssertionError, match="outside the vocabulary"):
        token_log_probs(hidden, weight, targets)


def test_tokens_without_gradient_cost_nothing_in_the_backward_pass() -> None:
    hidden, weight, targets = problem(40)
    log_probs, entropy = token_log_probs(hidden, weight, targets, chunk_tokens=8)
    assert entropy is not None
    for_log_probs, for_entropy = torch.zeros(40), torch.zeros(40)
    for_log_probs[3:9] = torch.randn(6)
    for_entropy[20:24] = torch.randn(4)
    with FlopCounterMode(display=False) as flops:
        actual = torch.autograd.grad((log_probs, entropy), (hidden, weight), (for_log_probs, for_entropy))
    flops_a_row = 3 * 2 * weight.numel()  # logits again, the gradient of hidden, the gradient of weight
    assert flops.get_total_flops() == 10 * flops_a_row
    expected = torch.autograd.grad(naive(hidden, weight, targets), (hidden, weight), (for_log_probs, for_entropy))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_frozen_weight_gets_no_gradient_product() -> None:
    hidden, weight, targets = problem(8)
    log_probs, _ = token_log_probs(hidden, weight.detach(), targets)
    with FlopCounterMode(display=False) as flops:
        log_probs.sum().backward()
    assert flops.get_total_flops() == 8 * 2 * 2 * weight.numel()


class AllocationRecorder(TorchDispatchMode):
    """Remembers the size of every storage that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in inputs:
                self.num_elements.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_the_full_logits_never_exist_and_a_chunks_memory_and_the_weight_gradient_are_made_once() -> None:
    num_tokens, vocabulary, hidden_size, chunk_tokens = 96, 32_768, 8, 16
    hidden, weight, targets = problem(num_tokens, vocabulary, hidden_size)
    with AllocationRecorder() as recorder:
        outputs = token_log_probs(hidden, weight, targets, chunk_tokens=chunk_tokens)
        sum(o.sum() for o in outputs if o is not None).backward()  # type: ignore[union-attr]
    assert max(recorder.num_elements) == chunk_tokens * vocabulary
    # The forward pass makes a chunk's memory, and the backward pass has it too.
    assert recorder.num_elements.count(chunk_tokens * vocabulary) == 1
    assert recorder.num_elements.count(vocabulary * hidden_size) == 1


def with_main_grad(weight: Tensor, main_grad: Tensor) -> Tensor:
    """What Megatron's data-parallel wrapper makes of a parameter."""
    weight.main_grad, weight.grad_added_to_main_grad = main_grad, False  # type: ignore[attr-defined]
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_with_a_main_grad_has_its_gradient_added_there_unrounded(dtype: torch.dtype) -> None:
    hidden, weight, targets = problem(13, dtype=dtype)
    exact_inputs = tuple(x.detach().double().requires_grad_() for x in (hidden, weight))
    expected = gradients(naive(*exact_inputs, targets), exact_inputs)
    main_grad = torch.full(weight.shape, 0.25)
    with_main_grad(weight, main_grad)
    for micro_batch in (1, 2):
        outputs = token_log_probs(hidden, weight, targets, chunk_tokens=5)
        grad_hidden, _ = gradients(outputs, (hidden, weight))
        assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
        torch.testing.assert_close(main_grad.double(), 0.25 + micro_batch * expected[1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(grad_hidden.double(), expected[0], rtol=2**-8, atol=1e-4)


def test_no_tokens_and_no_gradients_leave_a_main_grad_as_it_is() -> None:
    hidden, weight, targets = problem(7)
    with_main_grad(weight, torch.full(weight.shape, 0.25))
    for num_tokens in (0, 7):
        log_probs, _ = token_log_probs(hidden[:num_tokens], weight, targets[:num_tokens])
        (0 * log_probs.sum()).backward()
        assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
        assert (weight.main_grad == 0.25).all()  # type: ignore[attr-defined]


def test_a_second_backward_pass_gives_what_the_first_gave() -> None:
    hidden, weight, targets = problem(9)
    log_probs, _ = token_log_probs(hidden, weight, targets, chunk_tokens=4)
    first = torch.autograd.grad(log_probs.sum(), (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(log_probs.sum(), (hidden, weight))
    torch.testing.assert_close(second, first, rtol=0, atol=0)


def test_padding_rows_of_a_main_grad_stay_as_they_are() -> None:
    hidden, weight, targets = problem(11, vocabulary=64)
    with_main_grad(weight, torch.zeros(64, 16))
    targets %= 40
    gradients(token_log_probs(hidden, weight, targets, vocabulary_size=40), (hidden, weight))
    assert weight.main_grad[:40].all(dim=1).all()  # type: ignore[attr-defined]
    assert not weight.main_grad[40:].any()  # type: ignore[attr-defined]


def test_a_main_grad_of_less_precision_is_left_to_megatron() -> None:
    hidden, weight, targets = problem(9)
    expected = gradients(token_log_probs(hidden, weight, targets), (hidden, weight))
    with_main_grad(weight, torch.zeros(weight.shape, dtype=torch.bfloat16))
    found = gradients(token_log_probs(hidden, weight, targets), (hidden, weight))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not weight.main_grad.any()  # type: ignore[attr-defined]
    assert not weight.grad_added_to_main_grad  # type: ignore[attr-defined]


def test_to_an_embedding_tied_to_the_output_layer_nothing_is_added_but_its_own_gradient() -> None:
    hidden, weight, targets = problem(9)
    with_main_grad(weight, torch.zeros(weight.shape))
    weight.zero_out_wgrad = True  # type: ignore[attr-defined]  # Megatron's mark of tied embeddings
    log_probs, _ = token_log_probs(hidden, weight, targets)
    assert torch.autograd.grad(log_probs.sum(), weight, allow_unused=True) == (None,)
    assert weight.main_grad.all()  # type: ignore[attr-defined]
