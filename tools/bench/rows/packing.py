"""Packing beside padding to the longest: how full micro-batches are, what a pass costs, and that both compute the same.

The logits of real tokens and the gradient are held to those of the padded pass that is timed, and the logits to those
of each sample by itself.

Lengths are log-normal, as those of a reasoning model's responses: most are short, and a few are as long as is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from megatron_gspo.data.packing import fill_fraction, pack, plan_micro_batches
from megatron_gspo.model.policy import PolicyModel
from megatron_gspo.types import MicroBatch, Sample
from tools.bench import models
from tools.bench.harness import Bench

BUDGET, LONGEST = 16_384, 8192
MEAN_LENGTH = 1500


def measure(bench: Bench) -> None:
    """Fill of a step's plan at full size; cost and logits on a small model."""
    plans = [long_tailed(512, LONGEST, MEAN_LENGTH, seed) for seed in range(16)]
    fills = [fill_fraction(plan_micro_batches(lengths, BUDGET), lengths, BUDGET) for lengths in plans]
    bench.figure("fill of the token budget, 512 responses", fills, better="higher", aim=0.98)
    padded = [sum(lengths) / (len(lengths) * max(lengths)) for lengths in plans]
    bench.figure("the same, padded to the longest", padded, better="higher")

    lengths = long_tailed(16, 256, 64, seed=0)
    given = models.samples(lengths)
    model = models.policy(models.config(num_hidden_layers=2))
    packed, padded_to_longest = pack_as(given, 1), pack_as(given, max(lengths))
    check_logits(bench, model, given, packed, padded_to_longest)
    gradients = [gradient(model, micro_batch) for micro_batch in (packed, padded_to_longest)]
    bench.same("gradient of the embedding, packed and padded", *gradients, tolerance=1e-4)
    times = bench.alternate(
        {"packed": partial(run, model, packed), "padded": partial(run, model, padded_to_longest)},
        rounds=2 * bench.rounds,
    )
    bench.figure("time of a padded pass / a packed one", times.ratio("padded", "packed"), better="higher", aim=1.0)
    tokens = len(padded_to_longest.token_ids) / len(packed.token_ids)
    bench.note(f"the padded pass has {tokens:.2f} × the tokens of the packed one")
    bench.profile(partial(run, model, packed))


def long_tailed(count: int, longest: int, mean: int, seed: int) -> list[int]:
    """`count` log-normal lengths around `mean`, cut off at `longest`."""
    rng = np.random.default_rng(seed)
    drawn = rng.lognormal(np.log(mean) - 0.5, 1.0, count)
    return [int(length) for length in np.clip(drawn, 20, longest)]


def pack_as(samples: Sequence[Sample], pad_segments_to: int) -> MicroBatch:
    return pack(
        samples,
        pad_to_multiple=pad_segments_to,
        pad_token_id=0,
        device="cpu",
        pad_segments_to_multiple=pad_segments_to,
    )


def check_logits(
    bench: Bench, model: PolicyModel, given: Sequence[Sample], packed: MicroBatch, padded: MicroBatch
) -> None:
    """The packed samples' logits beside those of the padded ones, padding left out, and of each sample alone."""
    with torch.no_grad():
        together = model.logits(packed)
        of_padded = model.logits(padded)[padded.is_sample_token]
        alone = torch.cat([model.logits(pack_as([sample], 1)) for sample in given])
    bench.same("logits of packed and of padded samples", together, of_padded, tolerance=1e-4)
    bench.same("logits of packed and of single samples", together, alone, tolerance=1e-4)


def gradient(model: PolicyModel, micro_batch: MicroBatch) -> Tensor:
    """The embedding's, [vocabulary, hidden]: every layer's, and that of the log-probs, went into it."""
    run(model, micro_batch)
    found = model.embedding.word_embeddings.weight.grad
    assert found is not None
    return found.clone()


def run(model: PolicyModel, micro_batch: MicroBatch) -> None:
    """Forward and backward."""
    model.zero_grad()
    model(micro_batch).log_probs.mean().backward()
