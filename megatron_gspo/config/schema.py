"""The recipe's fields, one section a part of the system, with defaults and units in their descriptions.

What one field alone may hold stands here, in its type. What holds between fields stands in `check.py`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_gspo.config.section import (
    DecayRate,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    Switch,
    TextPath,
)
from megatron_gspo.config.sglang import SglangSection
from megatron_gspo.config.slurm import SlurmSection

BUILT_IN_TASKS = ("arithmetic_chain",)
"""Names that `data.train` and `data.eval` take instead of a path; each has its settings under `data.<name>`."""


class ModelSection(Section):
    path: TextPath
    """A Hugging Face checkpoint directory; with only a `config.json` in it (and a tokenizer) the weights are random."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What the model computes in. Optimizer states and gradients are float32 either way."""
    spec: Literal["auto", "local", "transformer_engine"] = "auto"
    """Which layers to build: Transformer Engine's where it is installed (`auto`), or this project's own."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass recomputes instead of keeping: nothing, the core attention and experts' activation, or every layer."""
    log_probs_chunk_tokens: Positive = 1024
    """Response tokens whose logits exist at one time; memory is this times vocabulary times 4 bytes."""


def _fewest_replicas(sizes: dict[str, Any]) -> int:
    """The smallest data-parallel size whose ranks hold every expert: with fewer, Megatron cannot form expert groups."""
    dense = sizes["tensor"] * sizes["context"] * sizes["pipeline"]
    moe = (sizes["expert_tensor"] or sizes["tensor"]) * sizes["expert"] * sizes["pipeline"]
    return math.lcm(dense, moe) // dense


class ParallelSection(Section):
    """How many ranks share what. Outside the experts a replica of the model is tensor × pipeline × context ranks."""

    tensor: Positive = 1
    expert: Positive = 1
    expert_tensor: Positive | None = None
    """Tensor-parallel size inside the experts; null takes `tensor`."""
    pipeline: Positive = 1
    virtual_pipeline: Annotated[int, Field(ge=2)] | None = None
    """Model chunks a pipeline rank holds (interleaved schedule); null for one."""
    context: Positive = 1
    data: Positive = Field(default_factory=_fewest_replicas)
    """Data-parallel replicas `train` launches by itself; under torchrun or srun it is what the world size leaves.
    Default: the fewest that hold `expert` × `expert_tensor` expert shards."""
    distributed_optimizer: Switch = True
    """Shard optimizer states over the data-parallel ranks."""
    overlap_gradient_reduce: Switch = False
    """Sum gradients over the data-parallel ranks bucket by bucket, while the last backward pass still runs."""
    overlap_parameter_gather: Switch = False
    """Gather updated parameters bucket by bucket while the next forward pass runs; needs `distributed_optimizer` and
    `overlap_gradient_reduce`."""
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens reach their experts. `allgather` brings all tokens to all ranks that share the experts: for few ranks
    and many active experts, among ranks that hold parts of the same micro-batch. Where each rank has all experts whole,
    nothing is sent and this has no effect."""

    @property
    def expert_tensor_size(self) -> int:
        """Tensor-parallel size inside the experts, with the default filled in."""
        return self.expert_tensor or self.tensor

    @property
    def model_size(self) -> int:
        """Ranks that hold one replica of what is not an expert."""
        return self.tensor * self.pipeline * self.context

    @property
    def expert_model_size(self) -> int:
        """Ranks that hold one replica of the experts (Megatron's expert-tensor-model-pipeline group)."""
        return self.expert_tensor_size * self.expert * self.pipeline

    @property
    def world_size(self) -> int:
        """Ranks of the trainer."""
        return self.model_size * self.data


class ObjectiveSection(Section):
    name: str = "gspo"
    """A name in `policy_loss.OBJECTIVES`, or `package.module:attribute` of one's own."""
    clip_low: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Lower clip range ε_low, so the ratio is kept above 1 - ε_low; null takes the objective's own (GSPO 3e-4, GRPO 0.2)."""
    clip_high: PositiveFloat | None = None
    """Upper clip range ε_high; null takes the objective's own (GSPO 4e-4, GRPO 0.27)."""
    dual_clip: Annotated[float, Field(gt=1.0)] | None = None
    """Cap on the ratio of responses with negative advantage (above 1); null for none."""
    aggregation: Literal["sequence_mean", "token_mean", "constant_length"] = "sequence_mean"
    """How token losses become one number; the paper's (eqs. 2, 6, 14) is the mean over responses of the mean over tokens."""
    constant_length: Positive | None = None
    """Tokens to divide by under `aggregation: constant_length`; null takes `rollout.max_response_tokens` (times
    `environment.max_turns` under an environment)."""
    advantage_normalization: Literal["std", "none"] = "std"
    """Divide a group's centred rewards by their standard deviation (eq. 7), or not."""
    truncated_importance_cap: Annotated[float, Field(ge=1.0)] | None = None
    """Multiply what a token adds to the loss by min(π_old / π_engine, this), as the trainer recomputed it and as the engine
    sampled it; null multiplies by nothing. A response's ratio has one weight a response. Needs `rollout.old_log_probs: trainer`;
    2 is usual."""
    kl_coefficient: NonNegativeFloat = 0.0
    """Weight of the KL penalty to the reference policy (the weights the run started from); 0 builds no reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """How the KL is estimated from the sampled token's two log-probs: k1 unbiased, k2 low variance, k3 both."""


class RoutingSection(Section):
    replay: Literal["off", "r2", "r3"] = "off"
    """Routing Replay (§5.3): r2 replays the routes of the old-policy pass, r3 those of the rollout engine."""
    measure: Switch = True
    """Measure expert volatility: routes under the new policy against the old one's. A dense model has none to measure."""
    probe_every: Positive = 1
    """Steps between measurements on the probe, a batch forwarded without replay before and after the step's updates."""
    probe_responses: Positive = 16
    """Responses of the step that make up the probe, over all replicas: every n-th one."""
    routes_on_host: Switch = False
    """Keep recorded routes in (pinned) host memory instead of on the GPU."""


class RolloutSection(Section):
    engine: Literal["local", "sglang"] = "local"
    """`local`: Hugging Face Transformers in the trainer's process; `sglang`: SGLang servers over HTTP."""
    old_log_probs: Literal["trainer", "engine"] = "trainer"
    """Whose log-probs are the old policy's: recomputed by the trainer, or the rollout engine's own (§5.4)."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """What the local engine computes in; null takes `model.dtype`. bfloat16 under a float32 trainer is the mismatch
    between engines that §5.4 is about. SGLang servers have `rollout.sglang.dtype`."""
    responses_per_prompt: Annotated[int, Field(ge=2)] = 8
    """G, the group's size; at least 2, because an advantage is relative to the group."""
    max_prompt_tokens: Positive = 1024
    """Longer prompts are left out, and counted."""
    max_response_tokens: Positive = 1024
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: NonNegative = 0
    """Sample from the k most likely tokens; 0 for all."""
    max_concurrent_responses: Positive = 256
    """Responses the local engine decodes in one batch."""
    close_at_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """A step closes when this share of the groups that are sampled is complete. So that it still trains on
    `training.prompts_per_step` of them, that many over this share are sampled at one time; the others are carried to the
    next step, and finished by its weights. 1 waits for all."""
    one_step_ahead: Switch = False
    """Sample the next step's responses while this step trains."""
    max_staleness: Positive = 4
    """Policy versions (one a step) that the oldest token of a response may be behind the policy that learns from it. A
    response carried for longer is sampled anew."""
    dynamic_sampling_rounds: NonNegative = 0
    """How many times a step may draw further prompts in place of those whose rewards are all equal, which teach nothing
    (DAPO's dynamic sampling); 0 trains on all groups as they come."""
    verify_weights: Switch = False
    """After every hand-over have each server compute the log-probs of a fixed sequence, and stop where they are not the trainer's."""
    sglang: SglangSection = SglangSection()


class EnvironmentSection(Section):
    """What answers in the middle of a response, which then has several turns."""

    name: str | None = None
    """`calculator`, or `package.module:attribute` that makes environments of one's own; null for responses of one turn.
    Under an environment `rollout.max_response_tokens` bounds a turn."""
    max_turns: Annotated[int, Field(ge=2)] = 4
    """A response that has not ended after as many turns is cut there."""
    max_observation_tokens: Positive = 256
    """Longer answers of the environment are cut after as many tokens."""


class RewardSection(Section):
    name: str = "task"
    """`task` (what the built-in task or data set asks for), `exact`, `math`, or `package.module:function`."""
    timeout_s: PositiveFloat = 10.0
    """A reward that takes longer scores 0 and is counted."""
    overlong_buffer_tokens: NonNegative = 0
    """Last tokens before `rollout.max_response_tokens` over which a response's reward is lowered, from 0 linearly to 1 for
    one that fills them (DAPO's soft overlong punishment); 0 for none."""


class ChainSection(Section):
    """The built-in task `arithmetic_chain`: a digit and operations mod 10; the response writes every step."""

    min_operations: Positive = 4
    max_operations: Positive = 4
    largest_operand: Annotated[int, Field(ge=1, le=9)] = 3
    """Operands are drawn from 1 to this; above 3 a tiny model takes far longer to leave guessing behind."""
    calculator: Switch = False
    """Demonstrations ask for each result, as `environment.name: calculator` answers it; a wrong step is one made unasked."""


class DataSection(Section):
    train: str
    """A JSONL or Parquet file, or a built-in task's name."""
    eval: str | None = None
    """The same for evaluation; null evaluates on nothing. A built-in task draws held-out problems."""
    chat_template: Switch = False
    """Render prompts through the tokenizer's chat template; `messages` prompts always are."""
    shuffle: Switch = True
    arithmetic_chain: ChainSection = ChainSection()


class TrainingSection(Section):
    steps: Positive
    """Rollouts of `prompts_per_step` prompts, each followed by `mini_batches` policy updates."""
    prompts_per_step: Positive
    """Problems a step samples `rollout.responses_per_prompt` responses to, over all replicas."""
    mini_batches: Positive = 4
    """Policy updates a step; each takes an equal share of the step's prompts."""
    tokens_per_micro_batch: Positive = 16384
    """Token budget a packed micro-batch is filled to. A longer sequence is a micro-batch of its own."""
    skip_zero_advantages: Switch = True
    """Do not pass responses through the model from which nothing can be learned: those with advantage 0, as all have in a
    group of equal rewards. The gradient is the same. `ratio/*`, `entropy/mean` and `mismatch/*` are then of the other
    responses. They are passed all the same under a KL penalty, and for an objective of one's own."""
    learning_rate: PositiveFloat = 1e-6
    min_learning_rate: NonNegativeFloat = 0.0
    warmup_updates: NonNegative = 0
    """Updates over which the learning rate rises from 0."""
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "constant"
    adam_beta1: DecayRate = 0.9
    adam_beta2: DecayRate = 0.95
    adam_epsilon: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    gradient_clip: PositiveFloat = 1.0
    """Largest gradient norm an update is made with."""
    save_every: NonNegative = 0
    """Steps between checkpoints; 0 saves at the end only."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints that are kept; older ones are deleted."""
    background_save: Switch = True
    """Go on as soon as the save is planned; copy the state to host memory beside the rollouts, and write it beside the
    run. Off waits until it is written, and without a GPU saves the memory of that copy."""
    max_skipped_updates: Positive = 3
    """Updates in a row that may be skipped for a non-finite loss or gradient before the run stops."""


class EvaluationSection(Section):
    every: NonNegative = 0
    """Steps between evaluations; 0 evaluates before the first step and after the last one only."""
    prompts: Positive = 64
    """Problems taken from `data.eval`, always the same ones."""
    samples_per_prompt: Positive = 4
    """n: pass@1 is averaged over n samples, pass@k is estimated from them."""
    temperature: NonNegativeFloat = 1.0
    """0 decodes greedily (and needs `samples_per_prompt: 1`)."""


class WarmstartSection(Section):
    """The supervised cold start (`warmstart`) on a built-in task's demonstrations or the data set's answers."""

    steps: Positive = 400
    sequences_per_step: Positive = 32
    """Demonstrations an update learns from, over all replicas."""
    learning_rate: PositiveFloat = 5e-3
    min_learning_rate: NonNegativeFloat = 5e-4
    """What a decaying schedule ends at."""
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: NonNegative = 20
    load_balance_coefficient: NonNegativeFloat = 0.01
    """Weight of the router's auxiliary load-balance loss; the cold start only, never in RL."""
    wrong_step_fraction: Fraction = 0.15
    """Share of a demonstration's steps made wrong on purpose and carried on from, so that sampling errs."""


class LoggingSection(Section):
    tensorboard: Switch = True
    wandb_project: str | None = None
    """Also log to this Weights & Biases project."""


class Recipe(Section):
    """What a run is. `load_recipe` reads it, `dump_recipe` writes it fully resolved."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1
    """What everything random in the run starts from: sampling, shuffling, initial weights."""
    model: ModelSection
    parallel: ParallelSection = ParallelSection()
    objective: ObjectiveSection = ObjectiveSection()
    routing: RoutingSection = RoutingSection()
    rollout: RolloutSection = RolloutSection()
    environment: EnvironmentSection = EnvironmentSection()
    reward: RewardSection = RewardSection()
    data: DataSection
    training: TrainingSection
    evaluation: EvaluationSection = EvaluationSection()
    warmstart: WarmstartSection = WarmstartSection()
    logging: LoggingSection = LoggingSection()
    slurm: SlurmSection = SlurmSection()

    @property
    def max_sampled_tokens(self) -> int:
        """Tokens that the policy samples of a response, over all turns, at most."""
        return self.rollout.max_response_tokens * (1 if self.environment.name is None else self.environment.max_turns)

    @property
    def max_sequence_tokens(self) -> int:
        """Tokens of a prompt with its response and what an environment adds to it, at most."""
        turns = 1 if self.environment.name is None else self.environment.max_turns
        # One answer before the first turn (`reset`), and one after each but the last.
        answers = 0 if self.environment.name is None else turns * self.environment.max_observation_tokens
        return self.rollout.max_prompt_tokens + self.max_sampled_tokens + answers
