"""Ratio statistics against NumPy, and how metrics behave: detached, on the device, additive."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_gspo.policy_loss import OBJECTIVES, finalize_metrics, policy_loss
from tests.unit.policy_loss.paper_equations import make_case, totals

CONTRACTED = {
    "loss/policy",
    "loss/kl",
    "ratio/token_log_std",
    "ratio/sequence_log_std",
    "ratio/effective_sample_fraction",
    "clip/token_fraction",
    "clip/sequence_fraction",
    "clip/low_fraction",
    "clip/high_fraction",
}
LENGTHS = (5, 1, 9, 3)


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_finalized_metrics_have_exactly_the_contracted_names(objective):
    case = make_case(LENGTHS, spread=0.1)
    output = policy_loss(objective, *case.arguments(), reference_log_probs=case.old_log_probs)
    assert set(finalize_metrics(totals([output]))) == CONTRACTED
    assert set(output.maxima) == {"ratio/token_abs_log_max", "ratio/sequence_abs_log_max"}


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_ratio_statistics_equal_numpys(objective):
    case = make_case(LENGTHS, spread=0.3, seed=7)
    case.advantages[0] = 0.0  # a response that teaches nothing still shows where the policy went
    log_ratio = (case.log_probs - case.old_log_probs).detach().numpy()
    sequence = np.array([piece.mean() for piece in np.split(log_ratio, np.cumsum(LENGTHS)[:-1])])
    weights = np.exp(log_ratio if objective == "grpo" else np.repeat(sequence, LENGTHS))

    output = policy_loss(objective, *case.arguments())
    metrics = finalize_metrics(totals([output]))

    assert metrics["ratio/token_log_std"] == pytest.approx(log_ratio.std(), rel=1e-10)
    assert metrics["ratio/sequence_log_std"] == pytest.approx(sequence.std(), rel=1e-10)
    assert float(output.maxima["ratio/token_abs_log_max"]) == pytest.approx(np.abs(log_ratio).max(), rel=1e-12)
    assert float(output.maxima["ratio/sequence_abs_log_max"]) == pytest.approx(np.abs(sequence).max(), rel=1e-12)
    expected = weights.sum() ** 2 / (len(weights) * np.square(weights).sum())
    assert metrics["ratio/effective_sample_fraction"] == pytest.approx(expected, rel=1e-10)


def test_an_unmoved_policy_has_no_spread_and_every_sample_effective():
    case = make_case(LENGTHS, spread=0.0)
    metrics = finalize_metrics(totals([policy_loss("grpo", *case.arguments())]))
    assert metrics["ratio/token_log_std"] == 0
    assert metrics["ratio/effective_sample_fraction"] == 1
    assert metrics["clip/token_fraction"] == 0


def test_an_overflowing_ratio_gives_an_effective_fraction_of_zero_and_not_nan():
    log_probs = torch.tensor([-1.0, -1.0])
    output = policy_loss("grpo", log_probs, torch.tensor([-1.0, -200.0]), torch.ones(1), torch.tensor([0, 2]))
    assert finalize_metrics(totals([output]))["ratio/effective_sample_fraction"] == 0


@pytest.mark.parametrize("objective", ["gspo", "grpo"])
def test_a_weight_whose_square_float32_cannot_hold_is_a_weight_like_others(objective):
    output = policy_loss(
        objective, torch.full((3,), -1.0), torch.full((3,), -51.0), torch.ones(1), torch.tensor([0, 3])
    )
    assert finalize_metrics(totals([output]))["ratio/effective_sample_fraction"] == pytest.approx(1.0)


def test_what_counted_nothing_is_left_out():
    assert finalize_metrics({"loss/policy": (0.0, 0.0), "clip/token_fraction": (1.0, 4.0)}) == {
        "clip/token_fraction": 0.25
    }


def test_sums_and_maxima_are_detached_scalars_and_counts_the_hosts():
    output = policy_loss("gspo", *make_case(LENGTHS, spread=0.1).arguments())
    scalars = [total for total, _ in output.metrics.values()] + list(output.maxima.values())
    assert all(scalar.shape == () and not scalar.requires_grad for scalar in scalars)
    assert all(isinstance(count, int) for _, count in output.metrics.values())


class _CountHostReads(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: reading a scalar, or a result whose size depends on the data."""

    reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.reads += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_loss_and_metrics_never_read_a_scalar_beyond_the_finite_check(objective):
    case = make_case(LENGTHS, spread=0.1)
    with _CountHostReads() as on_host:
        policy_loss(objective, *case.arguments(), reference_log_probs=case.old_log_probs, dual_clip=3.0).loss.backward()
    assert on_host.reads == 0  # the finite check reads its flags with one tolist(), which this mode does not see
    with _CountHostReads() as on_host:
        case.log_probs.sum().item()
    assert on_host.reads == 1, "the counter counts"
