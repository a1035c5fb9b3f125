"""The policy on Megatron-Core computes what Transformers computes: logits, log-probs and gradients."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from transformers import PreTrainedModel

from megatron_gspo.config import ParallelSection
from megatron_gspo.model.build import build_policy
from megatron_gspo.model.hf_weights import export_hf_weights, load_hf_weights
from megatron_gspo.model.policy import PolicyModel, TokenLogProbs
from tests.tiny_models import dense_config, micro_batch, model_section, moe_config, reference_model, sequences

CONFIGS = {
    "moe": moe_config(),
    "moe, gates not renormalised": moe_config(norm_topk_prob=False),
    "moe, one expert a token": moe_config(num_experts_per_tok=1, norm_topk_prob=False),
    "moe with dense layers": moe_config(mlp_only_layers=[1], decoder_sparse_step=2),
    "moe, tied embeddings": moe_config(tie_word_embeddings=True),
    "dense": dense_config(),
    "dense, tied embeddings": dense_config(tie_word_embeddings=True),
}


def policy_like(reference: PreTrainedModel, directory: Path, **model: Any) -> PolicyModel:
    reference.save_pretrained(directory)
    (policy,) = build_policy(directory, model_section(**model), ParallelSection())
    load_hf_weights([policy], directory)
    return policy


def loss_of(output: TokenLogProbs) -> torch.Tensor:
    weights = torch.linspace(-1, 1, len(output.log_probs))
    return (weights * output.log_probs).sum() + 0.1 * output.entropy.sum()


def gradients(policy: PolicyModel) -> dict[str, torch.Tensor]:
    """By Hugging Face name: they take the weights' place while these are exported."""
    for parameter in policy.parameters():
        parameter.data = parameter.grad
    return {name: gradient.clone() for name, gradient in export_hf_weights([policy])}


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_logits_equal_transformers(name: str, tmp_path: Path):
    reference = reference_model(CONFIGS[name])
    policy = policy_like(reference, tmp_path)
    tokens = sequences([7, 1, 12, 3])
    with torch.no_grad():
        logits = policy.logits(micro_batch(tokens, prompt_tokens=1))
        expected = torch.cat([reference(sequence[None]).logits[0] for sequence in tokens])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["moe", "dense"])
def test_padded_logits_equal_transformers(name: str, tmp_path: Path):
    reference = reference_model(CONFIGS[name])
    policy = policy_like(reference, tmp_path)
    tokens = sequences([9, 4])
    batch = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    with torch.no_grad():
        # What GPTModel itself does with [batch, sequence] input; the policy always packs.
        hidden = GPTModel.forward(policy, batch, torch.arange(9).expand(2, 9), None)
        logits = hidden.transpose(0, 1) @ policy.output_weight().T
        for row, sequence in enumerate(tokens):
            expected = reference(sequence[None]).logits[0]
            torch.testing.assert_close(logits[row, : len(sequence)], expected, rtol=0, atol=1e-5)


def test_log_probs_are_of_the_response_tokens_at_the_temperature(tmp_path: Path):
    reference = reference_model(CONFIGS["moe"])
    policy = policy_like(reference, tmp_path)
    batch = micro_batch(sequences([6, 9]), prompt_tokens=3)
    output = policy(batch, temperature=0.7)
    expected = torch.log_softmax(policy.logits(batch).double() / 0.7, dim=-1)[batch.predicting_positions]
    of_targets = expected.gather(1, batch.target_token_ids[:, None]).squeeze(1)
    torch.testing.assert_close(output.log_probs.double(), of_targets, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.entropy.double(), -(expected.exp() * expected).sum(-1), rtol=0, atol=1e-5)
    assert policy(batch, with_entropy=False).entropy is None


def test_packing_and_padding_leave_log_probs_as_they_are(tmp_path: Path):
    policy = policy_like(reference_model(CONFIGS["moe"]), tmp_path)
    tokens = sequences([5, 11, 2, 8])
    packed = policy(micro_batch(tokens, pad_to_multiple=8)).log_probs
    alone = torch.cat([policy(micro_batch([sequence])).log_probs for sequence in tokens])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["moe", "moe with dense layers", "moe, tied embeddings", "dense"])
def test_gradients_equal_transformers(name: str, tmp_path: Path):
    reference = reference_model(CONFIGS[name])
    policy = policy_like(reference, tmp_path)
    tokens = sequences([7, 12, 3])
    loss_of(policy(micro_batch(tokens))).backward()

    log_probs = [torch.log_softmax(reference(sequence[None]).logits[0, 1:-1], -1) for sequence in tokens]
    targets = [sequence[2:, None] for sequence in tokens]
    of_targets = torch.cat([rows.gather(1, target) for rows, target in zip(log_probs, targets, strict=True)])
    rows = torch.cat(log_probs)
    loss_of(TokenLogProbs(of_targets.squeeze(1), -(rows.exp() * rows).sum(-1))).backward()
    for parameter in reference.parameters():
        parameter.data = parameter.grad
    reference.save_pretrained(tmp_path / "gradients")
    (expected,) = build_policy(reference.config, model_section(), ParallelSection())
    load_hf_weights([expected], tmp_path / "gradients")

    found = gradients(policy)
    for weight, gradient in export_hf_weights([expected]):
        torch.testing.assert_close(
            found[weight], gradient, rtol=1e-4, atol=1e-4, msg=lambda text, w=weight: f"{w}: {text}"
        )


@pytest.mark.parametrize("is_overlapped", [False, True], ids=["", "gradients reduced during the backward pass"])
@pytest.mark.parametrize("name", ["moe", "moe, tied embeddings"])
def test_megatrons_wrapper_is_left_with_the_gradients_of_both_micro_batches(
    name: str, is_overlapped: bool, tmp_path: Path
):
    reference = reference_model(CONFIGS[name])
    batches = [micro_batch(sequences(lengths)) for lengths in ([7, 12, 3], [5, 9])]
    plain, policy = (policy_like(reference, tmp_path) for _ in range(2))
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=is_overlapped)
    wrapped = DistributedDataParallel(policy.config, config, policy)
    for batch in batches:
        loss_of(plain(batch)).backward()
        with wrapped.no_sync() if batch is batches[0] else nullcontext():
            loss_of(wrapped(batch)).backward()
    wrapped.finish_grad_sync()
    expected = dict(plain.named_parameters())
    for weight, parameter in policy.named_parameters():
        torch.testing.assert_close(
            parameter.main_grad, expected[weight].grad, rtol=1e-5, atol=1e-5, msg=lambda text, w=weight: f"{w}: {text}"
        )


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("name", ["moe", "dense"])
def test_recomputing_activations_leaves_gradients_as_they_are(name: str, recompute: str, tmp_path: Path):
    reference = reference_model(CONFIGS[name])
    batch = micro_batch(sequences([7, 12, 3]))
    found = {}
    for mode in ("none", recompute):
        policy = policy_like(reference, tmp_path, recompute=mode)
        loss_of(policy(batch)).backward()
        found[mode] = gradients(policy)
    for weight, gradient in found["none"].items():
        torch.testing.assert_close(found[recompute][weight], gradient, rtol=1e-5, atol=1e-5)


def test_a_micro_batch_without_responses_gives_every_weight_a_gradient_of_zero(tmp_path: Path):
    policy = policy_like(reference_model(CONFIGS["moe"]), tmp_path)
    output = policy(micro_batch(sequences([4]), prompt_tokens=4))
    assert output.log_probs.shape == (0,)
    loss_of(output).backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_bfloat16_stays_close_to_float32(tmp_path: Path):
    reference = reference_model(moe_config(initializer_range=0.05))
    batch = micro_batch(sequences([7, 12, 3]))
    exact = policy_like(reference, tmp_path)(batch).log_probs
    policy = policy_like(reference, tmp_path, dtype="bfloat16")
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.bfloat16}
    output = policy(batch)
    loss_of(output).backward()
    assert output.log_probs.dtype == torch.float32
    torch.testing.assert_close(output.log_probs, exact, rtol=0, atol=0.1)


def test_an_inexact_longest_segment_is_refused_because_rotary_positions_would_run_on(tmp_path: Path):
    policy = policy_like(reference_model(CONFIGS["dense"]), tmp_path)
    batch = micro_batch(sequences([4, 4]))
    object.__setattr__(batch, "max_segment_tokens", 8)
    with pytest.raises(AssertionError, match="max_segment_tokens"):
        policy(batch)
