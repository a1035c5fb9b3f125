"""What the study runs. It was written down before the results, and so were the rules in `claims.py`.

Changed after the first runs: R3 is compared with a bfloat16 engine, because with a float32 one its first two runs had been
R2's bit for bit; after one replicate had run, a difference that lies between 0 and the margin counts as none; and after two
replicates of three depths, depth asks for four. When all of that had run, sparser experts and longer responses were added,
4c and 5c, their rules first.

A run is a model, a cold start of it, an arm, a learning rate and a seed. Runs of one seed and cold start see the same
prompts in every arm, so arms are compared in pairs. A replicate is a (seed, cold start); both are what chance decides.

The task is the built-in one: chains of 4 operations modulo 10. A step is 16 prompts × 8 responses in 4 mini-batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

STEPS = 20
MINI_BATCHES = 4

#: A step's probe costs half as much as its updates; every fourth step is enough for the means that the claims are about.
PROBE_EVERY = 4

#: Where every run starts from; then its arm, experiment, model, learning rate and seed.
RECIPE = "recipes/tiny_gspo.yaml"
BASE: Mapping[str, object] = {
    "training.steps": STEPS,
    "training.mini_batches": MINI_BATCHES,
    "training.warmup_updates": 4 * MINI_BATCHES,
    "training.save_every": 10,
    "training.keep_checkpoints": 1,
    "routing.probe_every": PROBE_EVERY,
    "evaluation.every": 0,  # before the first step and after the last one
    "logging.tensorboard": "false",
}

#: Seeds of the comparisons; and those that learning rates are chosen with, so that no arm is tested on what chose for it.
SEEDS = (1, 2, 3, 4, 5)
TUNING_SEEDS = (11, 12)
OFF_POLICY_SEEDS = (6, 7, 8, 9, 10)
COLD_STARTS = (1, 2)  # the seeds that cold starts are made with

#: A pilot of eight runs (cold start 1, seed 1) chose these: at 8e-4 GSPO and GRPO both train, at 3.2e-3 both collapse. It
#: also showed GRPO collapsing at 8e-4 with 16 updates a step, which is why that experiment has seeds of its own.
COMMON_RATE = 8e-4
LEARNING_RATES = (2e-4, 4e-4, 8e-4, 1.2e-3, 1.7e-3, 2.4e-3)

#: The clip ranges of the controls: GSPO's times, and GRPO's over, √14. Over the 14 tokens of a response a mean of
#: independent log-ratios is √14 times narrower than one of them: at these ranges each objective clips like the other.
TIGHT_RANGE: Mapping[str, object] = {"objective.clip_low": 1.1e-3, "objective.clip_high": 1.5e-3}
WIDE_RANGE: Mapping[str, object] = {"objective.clip_low": 0.053, "objective.clip_high": 0.072}

#: GSPO's range made several times wider than what a bfloat16 engine spreads log s by at equal weights (about 0.005).
MISMATCH_RANGE: Mapping[str, object] = {"objective.clip_low": 0.03, "objective.clip_high": 0.04}


@dataclass(frozen=True)
class Model:
    """The shipped tiny model, but for what is named here."""

    name: str
    layers: int
    dense: bool = False  # one feed-forward network, as many parameters as the 16 experts have together
    experts: int = 16
    task: Mapping[str, object] = field(
        default_factory=dict
    )  # what its cold start and its runs learn, where that differs
    more_cost: float = 1.0  # CPU time of a run, relative to one without `experts` and `task`

    @property
    def cost(self) -> float:
        """CPU time of a run, relative to the shipped model of 8 layers; measured."""
        return (0.2 + 0.1 * self.layers * (0.6 if self.dense else 1.0)) * self.more_cost


#: Twice as many operations, and responses of nearly twice as many tokens.
LONG_TASK: Mapping[str, object] = {
    "data.arithmetic_chain.min_operations": 8,
    "data.arithmetic_chain.max_operations": 8,
    "rollout.max_response_tokens": 40,
}


MODELS = {
    model.name: model
    for model in (
        Model("moe_2", 2),
        Model("moe_4", 4),
        Model("moe_8", 8),
        Model("moe_16", 16),
        Model("dense_8", 8, dense=True),
        Model("moe_8_sparse", 8, experts=64, more_cost=1.05),
        Model("moe_8_long", 8, task=LONG_TASK, more_cost=1.2),
    )
}


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    title: str
    overrides: Mapping[str, object]


def _arm(name: str, title: str, objective: str, replay: str = "off", more: Mapping[str, object] | None = None) -> Arm:
    return Arm(name, title, {"objective.name": objective, "routing.replay": replay, **(more or {})})


_BF16 = {"rollout.dtype": "bfloat16"}
_ENGINE = {**_BF16, "rollout.old_log_probs": "engine"}
ARMS = {
    arm.name: arm
    for arm in (
        _arm("gspo", "GSPO", "gspo"),
        _arm("grpo", "GRPO", "grpo"),
        _arm("grpo_r2", "GRPO + R2", "grpo", "r2"),
        _arm("grpo_r3", "GRPO + R3", "grpo", "r3"),
        _arm("gspo_r2", "GSPO + R2", "gspo", "r2"),
        _arm("grpo_tight", "GRPO, tight clip", "grpo", more=TIGHT_RANGE),
        _arm("gspo_wide", "GSPO, wide clip", "gspo", more=WIDE_RANGE),
        _arm("gspo_bf16", "GSPO, trainer's likelihoods", "gspo", more=_BF16),
        _arm("gspo_engine", "GSPO, engine's likelihoods", "gspo", more=_ENGINE),
        _arm("gspo_engine_wide", "GSPO, engine's likelihoods, wider clip", "gspo", more={**_ENGINE, **MISMATCH_RANGE}),
        _arm("grpo_bf16", "GRPO, trainer's likelihoods", "grpo", more=_BF16),
        _arm("grpo_engine", "GRPO, engine's likelihoods", "grpo", more=_ENGINE),
        _arm("grpo_bf16_r3", "GRPO + R3, trainer's likelihoods", "grpo", "r3", more=_BF16),
    )
}

CORE = ("gspo", "grpo", "grpo_r2", "gspo_r2")
Replicate = tuple[int, int]  # seed, cold start


@dataclass(frozen=True)
class Experiment:
    """Runs that answer claims: every arm with every learning rate, model and replicate."""

    name: str
    title: str
    claims: tuple[str, ...]
    arms: tuple[str, ...]
    replicates: tuple[Replicate, ...]
    models: tuple[str, ...] = ("moe_8",)
    learning_rates: tuple[float, ...] = (COMMON_RATE,)  # () is each arm's best one of the sweep
    overrides: Mapping[str, object] = field(default_factory=dict)
    variant: str = ""  # names what `overrides` make of a run
    cost: float = 1.0  # CPU time of a run, relative to one without `overrides`; measured
    waves: tuple[int, ...] = (
        10,
    )  # replicates in each wave of the schedule: the first wave of all experiments comes first


def _paired(seeds: tuple[int, ...] = SEEDS) -> tuple[Replicate, ...]:
    """Every seed with every cold start, ordered so that the first half has every seed and both cold starts."""
    return tuple((seed, COLD_STARTS[(index + turn) % 2]) for turn in (0, 1) for index, seed in enumerate(seeds))


def _tuning() -> tuple[Replicate, ...]:
    return tuple(zip(TUNING_SEEDS, COLD_STARTS, strict=True))


_FOUR: tuple[Replicate, ...] = ((1, 1), (2, 2), (3, 1), (4, 2))

#: Four times as many updates from the same responses: the last of them are as far from the old policy as the paper's.
OFF_POLICY = {"training.mini_batches": 16, "training.warmup_updates": 64}

FULL = (
    Experiment("common", "Common learning rate", ("1", "2", "3", "4", "5"), CORE, _paired(), waves=(5, 0, 0, 0, 5)),
    Experiment(
        "engine",
        "bfloat16 engine",
        ("3", "6"),
        ("gspo_bf16", "gspo_engine", "grpo_bf16", "grpo_engine", "grpo_bf16_r3", "gspo_engine_wide"),
        _paired(),
        waves=(0, 0, 5, 0, 5),
    ),
    # A float32 engine takes the trainer's own routes, so R3 replays what R2 does; where they differ is above.
    Experiment("r3", "R3 with a float32 engine", ("3",), ("grpo_r3",), _paired()[:2], waves=(2,)),
    Experiment(
        "depth",
        "Depth",
        ("4",),
        ("grpo",),
        _FOUR,
        models=("moe_2", "moe_4", "moe_16"),
        waves=(0, 2, 0, 0, 2),
    ),
    Experiment(
        "sweep",
        "Learning rates",
        ("1", "3"),
        CORE,
        _tuning(),
        learning_rates=LEARNING_RATES,
        waves=(0, 0, 0, 2),
    ),
    Experiment(
        "best", "Each arm's best learning rate", ("1", "3"), CORE, _paired(), learning_rates=(), waves=(0, 0, 0, 0, 10)
    ),
    Experiment(
        "clip", "Clip range controls", ("1", "2"), ("grpo_tight", "gspo_wide"), _paired(), waves=(0, 0, 0, 3, 7)
    ),
    Experiment(
        "off_policy",
        "16 updates a step",
        ("1", "3"),
        ("gspo", "grpo", "grpo_r2", "grpo_tight"),
        _paired(OFF_POLICY_SEEDS)[:5],
        overrides=OFF_POLICY,
        variant="16_updates",
        cost=1.9,
        waves=(0, 0, 5),
    ),
    Experiment(
        "dense",
        "Dense model",
        ("3",),
        ("gspo", "grpo"),
        _tuning(),
        models=("dense_8",),
        learning_rates=LEARNING_RATES,
        waves=(0, 0, 0, 0, 2),
    ),
    Experiment(
        "sparse", "2 of 64 experts", ("4",), ("grpo",), _FOUR, models=("moe_8_sparse",), waves=(0, 0, 0, 0, 0, 4)
    ),
    Experiment(
        "long", "Chains of 8 operations", ("5",), ("grpo",), _FOUR, models=("moe_8_long",), waves=(0, 0, 0, 0, 0, 4)
    ),
)

#: What can be answered with few runs: five replicates of three arms, and the shallow models, which are cheap to start.
QUICK = (
    replace(FULL[0], arms=("gspo", "grpo", "grpo_r2"), replicates=_paired()[:5], waves=(5,)),
    replace(FULL[1], arms=("gspo_bf16", "gspo_engine"), replicates=_paired()[:5], waves=(0, 5)),
    replace(FULL[3], models=("moe_2", "moe_4"), replicates=_paired()[:4], waves=(0, 0, 4)),
)
