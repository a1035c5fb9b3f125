"""`tools/reproduce.sh` with a study of two runs that take seconds: a recipe, then its arguments."""

from __future__ import annotations

import sys

import tools.reproduce.__main__ as program
from tools.reproduce import plan, study

if __name__ == "__main__":
    recipe, *arguments = sys.argv[1:]
    plan.RECIPE = recipe
    plan.BASE = {  # type: ignore[misc]
        "training.steps": 12,
        "training.mini_batches": 2,
        "training.prompts_per_step": 2,
        "training.save_every": 1,
        "routing.probe_every": 4,
        "logging.tensorboard": "false",
    }
    common = study.Experiment(
        "common", "Common learning rate", ("1", "2"), ("gspo", "grpo_engine"), ((1, 1),), models=("moe_2",)
    )
    program.FULL = (common,)
    raise SystemExit(program.main(arguments))
