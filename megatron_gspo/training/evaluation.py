"""How good the policy is on held-out problems.

In: the rollout engine, whose weights are the policy's. Out: pass@1, the mean over problems of the share of n samples
that solve them, and pass@k, the chance that at least one of k samples does.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

from megatron_gspo import parallel
from megatron_gspo.config import Recipe
from megatron_gspo.data.prompts import PromptStream
from megatron_gspo.training.agreement import together, unless_an_engine_is_gone
from megatron_gspo.training.assembly import build_models, open_inputs
from megatron_gspo.training.engines import open_rollouts
from megatron_gspo.training.hand_over import hand_over_weights
from megatron_gspo.training.rollouts import Rollouts, ScoredResponses, evaluation_settings
from megatron_gspo.training.totals import Totals
from megatron_gspo.types import UserError

SOLVED_REWARD = 1.0
"""A response with this reward solves its problem; the paper's rewards lie in [0, 1]."""


def pass_at_k(num_samples: int, num_solved: int, k: int) -> float:
    """Chance that at least one of k of the n samples, drawn without replacement, solves the problem.

    Unbiased: 1 - C(n - c, k) / C(n, k) (Chen et al., 2021, "Evaluating Large Language Models Trained on Code").
    """
    assert 1 <= k <= num_samples, "k samples must exist"
    return 1.0 - comb(num_samples - num_solved, k) / comb(num_samples, k)


def evaluated_ks(num_samples: int) -> list[int]:
    """1, then the powers of two up to n."""
    return [2**power for power in range(num_samples.bit_length()) if 2**power <= num_samples]


def evaluate(recipe: Recipe, held_out: PromptStream, rollouts: Rollouts | None) -> dict[str, float]:
    """`eval/{name}/pass_at_{k}`, `…/length_mean` and `…/truncated_fraction`; the same on every rank.

    Always the same problems, split over the data-parallel ranks.

    Raises:
        OutageError: a data leader's engine is gone; on every rank.
    """
    num_samples = recipe.evaluation.samples_per_prompt
    own = held_out.held_out_prompts(recipe.evaluation.prompts)[parallel.data_rank() :: parallel.data_size()]
    totals = Totals()

    def sample() -> ScoredResponses | None:
        if rollouts is None or not own:
            return None
        return rollouts.sample_and_score(own, num_samples, evaluation_settings(recipe, rollouts.tokenizer))

    scored = unless_an_engine_is_gone(sample)
    if scored is not None:
        _record_passes([int((rewards >= SOLVED_REWARD).sum()) for rewards in scored.outcomes], num_samples, totals)
        for response in (response for group in scored.responses for response in group):
            totals.add("length_mean", response.num_sampled_tokens, 1)
            totals.add("truncated_fraction", response.finish_reason == "length", 1)
    combined = totals.over_ranks(measured_here=rollouts is not None)
    return {f"eval/{held_out.name}/{name}": total / count for name, (total, count) in combined.sums.items()}


def evaluate_checkpoint(recipe: Recipe) -> dict[str, float]:
    """Evaluate the weights in `recipe.model.path` and print the result.

    Raises:
        UserError: the recipe names no evaluation data, or its model, data or reward cannot be used.
    """
    if recipe.data.eval is None:
        raise UserError("data.eval is not set; accepted: a .jsonl or .parquet file, or a task's name")
    inputs = together(lambda: open_inputs(recipe))
    assert inputs.held_out is not None, "data.eval is set"
    rollouts = open_rollouts(recipe, inputs.tokenizer)
    try:
        hand_over_weights(build_models(recipe), rollouts, version=0)
        metrics = evaluate(recipe, inputs.held_out, rollouts)
    finally:
        if rollouts is not None:
            rollouts.close()
    if parallel.is_main_rank():
        print(f"{recipe.model.path}, {recipe.evaluation.samples_per_prompt} samples a problem:")
        for name, value in sorted(metrics.items()):
            print(f"  {name}: {value:.4f}")
    return metrics


def _record_passes(num_solved: Sequence[int], num_samples: int, totals: Totals) -> None:
    for k in evaluated_ks(num_samples):
        totals.add(
            f"pass_at_{k}", sum(pass_at_k(num_samples, solved, k) for solved in num_solved), float(len(num_solved))
        )
