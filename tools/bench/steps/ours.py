"""This project's step: `python -m tools.bench.steps.ours CHECKPOINT MAX_RESPONSE_TOKENS`, told by `turns.Teller`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from megatron_gspo import parallel
from megatron_gspo.config import load_recipe
from megatron_gspo.data.packing import pack
from megatron_gspo.policy_loss import finalize_metrics
from megatron_gspo.training.assembly import assemble
from megatron_gspo.training.experience import MiniBatch, pack_samples
from megatron_gspo.training.forward import token_log_probs
from megatron_gspo.training.guards import SkippedUpdates
from megatron_gspo.training.loop import Run, learn
from megatron_gspo.training.rollouts import pad_token_id
from megatron_gspo.training.step import MiniBatchLoss, update_policy
from megatron_gspo.training.totals import Totals
from megatron_gspo.types import Sample
from tools.bench import steps
from tools.bench.steps.turns import Compared, Told

RECIPE = Path(__file__).resolve().parents[3] / "recipes/tiny_gspo.yaml"
STAGES = {
    "rollout": "rollout",
    "reward": "rewards",
    "old_policy": "old-policy pass",
    "update": "updates",
    "weight_sync": "the weights' hand-over",
    "step": "whole step",
}  # time/…_s in a step's metrics -> as it is reported


def main(checkpoint: str, max_response_tokens: str) -> None:
    """Build a run and make steps of it."""
    told = Told()
    torch.set_num_threads(1)
    problems = Path(checkpoint) / "problems.jsonl"
    problems.write_text("".join(json.dumps({"prompt": text, "answer": "0"}) + "\n" for text in steps.PROBLEMS))
    beta1, beta2 = steps.ADAM_BETAS
    recipe = load_recipe(
        RECIPE,
        [
            f"model.path={checkpoint}",
            f"data.train={problems}",
            "data.eval=null",
            "reward.name=tools.bench.steps:reward",
            "routing.measure=false",
            "training.skip_zero_advantages=false",  # TRL forwards them
            f"objective.clip_low={steps.CLIP_LOW}",
            f"objective.clip_high={steps.CLIP_HIGH}",
            f"rollout.responses_per_prompt={steps.RESPONSES_PER_PROMPT}",
            f"rollout.max_response_tokens={max_response_tokens}",
            f"training.prompts_per_step={steps.PROMPTS}",
            f"training.mini_batches={steps.MINI_BATCHES}",
            f"training.learning_rate={steps.LEARNING_RATE}",
            f"training.adam_beta1={beta1}",
            f"training.adam_beta2={beta2}",
            "training.warmup_updates=0",
        ],
    )
    parallel.initialize_distributed()
    parallel.initialize_model_parallel(recipe.parallel, recipe.seed)
    run = assemble(recipe)
    skipped, count = SkippedUpdates(1), iter(range(1, 1000))

    def step() -> tuple[int, Mapping[str, float]]:
        number = next(count)
        experience = run.collector.collect(number, run.policy.version)
        metrics = learn(run, experience, number, skipped).metrics
        tokens = sum(
            len(group.prompt.token_ids) + len(response.token_ids)
            for group in experience.groups
            for response in group.responses
        )
        return tokens, {shown: metrics[f"time/{name}_s"] for name, shown in STAGES.items()}

    told.say(compared(run, skipped))
    told.serve(step)
    run.close()
    parallel.shutdown()


def compared(run: Run, skipped: SkippedUpdates) -> Compared:
    """Make one update on `FIXED`."""
    before = probe(run)
    samples = [
        Sample(
            number,
            np.array(fixed.prompt),
            np.array(fixed.response),
            fixed.advantage,
            np.zeros(len(fixed.response), np.float32),
        )
        for number, fixed in enumerate(steps.FIXED)
    ]
    micro_batches = pack_samples(samples, run.recipe, pad_token_id(run.tokenizer))
    mini_batch = MiniBatch(micro_batches, len(samples), sum(sample.num_sampled_tokens for sample in samples))
    old = []
    own = token_log_probs(run.policy.chunks, micro_batches, temperature=1.0)
    for micro_batch, log_probs in zip(micro_batches, own, strict=True):
        shifts = [shift for index in micro_batch.sample_indices for shift in steps.FIXED[index].shifts]
        old.append(log_probs + torch.tensor(shifts))
    totals, loss = Totals(), MiniBatchLoss(run.recipe, mini_batch, old, None)
    update_policy(run.policy, mini_batch, loss, skipped, 0, totals, measure_mismatch=False)
    run.policy.version += 1
    run.hand_over_weights()
    metrics = finalize_metrics(totals.sums)
    return Compared(before, metrics["loss/policy"], metrics["grad_norm"], probe(run))


def probe(run: Run) -> list[float]:
    """Log-probs of `PROBE` after its first token."""
    ids = torch.tensor(steps.PROBE).numpy()
    sample = Sample(0, ids[:1], ids[1:], 0.0, ids[1:].astype("float32"))
    batch = pack([sample], pad_to_multiple=1, pad_token_id=0, device="cpu")
    (log_probs,) = token_log_probs(run.policy.chunks, [batch], temperature=1.0)
    found: list[float] = log_probs.tolist()
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
