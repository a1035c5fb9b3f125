"""One update of the tiny model, on one rank, from responses that a seed decides."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_gspo.config import Recipe, load_recipe
from megatron_gspo.training.assembly import build_models, reinforcement_learning_rate
from megatron_gspo.training.experience import MiniBatch, pack_samples
from megatron_gspo.training.forward import token_log_probs
from megatron_gspo.training.guards import SkippedUpdates
from megatron_gspo.training.optimizer import TrainablePolicy, build_trainable_policy
from megatron_gspo.training.step import MiniBatchLoss, update_policy
from megatron_gspo.training.totals import Totals
from megatron_gspo.types import Sample
from tests.tiny_model import tiny_recipe, write_tiny_model


def make_recipe(path: Path, **sections: dict) -> Recipe:
    write_tiny_model(path / "model")
    (path / "recipe.yaml").write_text(tiny_recipe(path / "model", **sections))
    return load_recipe(path / "recipe.yaml")


def make_policy(recipe: Recipe) -> TrainablePolicy:
    return build_trainable_policy(build_models(recipe), recipe, reinforcement_learning_rate(recipe))


def make_samples(num_samples: int = 12, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(num_samples):
        prompt, response = rng.integers(3, 12), rng.integers(2, 24)
        samples.append(
            Sample(
                index=index,
                prompt_token_ids=rng.integers(0, 256, prompt),
                response_token_ids=rng.integers(0, 256, response),
                advantage=float(rng.normal()),
                behaviour_log_probs=np.full(response, -5.0, dtype=np.float32),
            )
        )
    return samples


def mini_batch_of(samples: list[Sample], recipe: Recipe) -> MiniBatch:
    num_tokens = sum(len(sample.response_token_ids) for sample in samples)
    return MiniBatch(pack_samples(samples, recipe, pad_token_id=256), len(samples), num_tokens)


def with_budget(recipe: Recipe, tokens: int) -> Recipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"tokens_per_micro_batch": tokens})})


def gradients(policy: TrainablePolicy) -> dict[str, torch.Tensor]:
    return {name: parameter.main_grad.clone() for name, parameter in policy.models[0].named_parameters()}


def old_log_probs_nearby(
    policy: TrainablePolicy, mini_batch: MiniBatch, samples: Sequence[Sample]
) -> list[torch.Tensor]:
    """Log-probs a little off the current ones, alike however samples are packed: ratios differ from 1, some are clipped."""
    generator = torch.Generator().manual_seed(1)
    shift = {s.index: torch.randn(len(s.response_token_ids), generator=generator) * 0.3 for s in samples}
    current = token_log_probs(policy.chunks, mini_batch.micro_batches, temperature=1.0)
    return [
        log_probs + torch.cat([shift[index] for index in micro_batch.sample_indices])
        for log_probs, micro_batch in zip(current, mini_batch.micro_batches, strict=True)
    ]


def update(policy: TrainablePolicy, recipe: Recipe, mini_batch: MiniBatch, old: list[torch.Tensor]) -> Totals:
    totals = Totals()
    loss = MiniBatchLoss(recipe, mini_batch, old, None)
    update_policy(policy, mini_batch, loss, SkippedUpdates(3), 1, totals, measure_mismatch=False)
    return totals
