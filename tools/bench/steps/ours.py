"""This project's step: `python -m tools.bench.steps.ours CHECKPOINT MAX_RESPONSE_TOKENS`, told by `turns.Teller`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from megatron_gspo import parallel
from megatron_gspo.config import load_recipe
from megatron_gspo.data.packing import pack
from megatron_gspo.training.assembly import assemble
from megatron_gspo.training.forward import token_log_probs
from megatron_gspo.training.guards import SkippedUpdates
from megatron_gspo.training.loop import Run, learn
from megatron_gspo.types import Sample
from tools.bench import steps
from tools.bench.steps.turns import Told

RECIPE = Path(__file__).resolve().parents[3] / "recipes/tiny_gspo.yaml"


def main(checkpoint: str, max_response_tokens: str) -> None:
    """Build a run and make steps of it."""
    told = Told()
    torch.set_num_threads(1)
    problems = Path(checkpoint) / "problems.jsonl"
    problems.write_text("".join(json.dumps({"prompt": text, "answer": "0"}) + "\n" for text in steps.PROBLEMS))
    recipe = load_recipe(
        RECIPE,
        [
            f"model.path={checkpoint}",
            f"data.train={problems}",
            "data.eval=null",
            "reward.name=tools.bench.steps:reward",
            "routing.measure=false",
            "training.skip_zero_advantages=false",  # TRL forwards them
            f"rollout.responses_per_prompt={steps.RESPONSES_PER_PROMPT}",
            f"rollout.max_response_tokens={max_response_tokens}",
            f"training.prompts_per_step={steps.PROMPTS}",
            f"training.mini_batches={steps.MINI_BATCHES}",
            f"training.learning_rate={steps.LEARNING_RATE}",
            "training.warmup_updates=0",
        ],
    )
    parallel.initialize_distributed()
    parallel.initialize_model_parallel(recipe.parallel, recipe.seed)
    run = assemble(recipe)
    skipped, count = SkippedUpdates(1), iter(range(1, 1000))

    def step() -> int:
        number = next(count)
        experience = run.collector.collect(number, run.policy.version)
        learn(run, experience, number, skipped)
        return sum(
            len(group.prompt.token_ids) + len(response.token_ids)
            for group in experience.groups
            for response in group.responses
        )

    told.serve(probe(run), step)
    run.close()
    parallel.shutdown()


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
