"""Sampling and scoring: the rollout engine and the reward, on the rank that drives its share of the data.

In: prompts, and the policy's weights at each hand-over. Out: G scored responses a prompt. Data leaders hold a `Rollouts`;
the other ranks of their model-parallel groups take part in the hand-over only.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_gspo import parallel
from megatron_gspo.config import Recipe
from megatron_gspo.reward import RewardScorer, ScoringItem
from megatron_gspo.rollout.engine import RolloutEngine
from megatron_gspo.rollout.multi_turn import MultiTurn
from megatron_gspo.types import Prompt, Response, SamplingSettings, UserError


@dataclass(frozen=True)
class ScoredResponses:
    """Responses with their rewards, by prompt."""

    responses: list[tuple[Response, ...]]
    rewards: list[np.ndarray]  # one [G] float32 a prompt, with what an environment gave on the way
    outcomes: list[np.ndarray]  # the same without: what the reward makes of how the response ended
    num_failed_rewards: int


@dataclass
class Rollouts:
    """The rollout engine and the reward of one data leader."""

    engine: RolloutEngine
    scorer: RewardScorer
    tokenizer: PreTrainedTokenizerBase
    multi_turn: MultiTurn | None = None  # samples turn by turn where the recipe has an environment

    def sample_and_score(
        self, prompts: Sequence[Prompt], responses_per_prompt: int, settings: SamplingSettings
    ) -> ScoredResponses:
        """G responses to each prompt, and their rewards."""
        return self.score(prompts, self.generate(prompts, responses_per_prompt, settings))

    def generate(
        self, prompts: Sequence[Prompt], responses_per_prompt: int, settings: SamplingSettings
    ) -> list[tuple[Response, ...]]:
        """G responses to each prompt, of one turn or several."""
        return (self.multi_turn or self.engine).generate(prompts, responses_per_prompt, settings)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[tuple[Response, ...]]) -> ScoredResponses:
        """The rewards of each prompt's responses, equally many a prompt. Of several turns the last one's text is scored."""
        items = [
            ScoringItem(
                prompt=prompt,
                response_text=self.tokenizer.decode(response.last_turn_token_ids, skip_special_tokens=True),
                finished=response.finish_reason == "stop",
            )
            for prompt, group in zip(prompts, responses, strict=True)
            for response in group
        ]
        scored = self.scorer.score(items)
        on_the_way = np.array([r.environment_reward for group in responses for r in group], dtype=np.float32)
        shape = (len(prompts), len(responses[0])) if items else (0, 0)
        return ScoredResponses(
            responses=list(responses),
            rewards=list((scored.rewards + on_the_way).reshape(shape)),
            outcomes=list(scored.rewards.reshape(shape)),
            num_failed_rewards=scored.num_failed,
        )

    def take_counts(self) -> dict[str, float]:
        """What happened to the engine and the environments since this was last asked, by metric name."""
        return self.engine.take_counts() | (self.multi_turn.take_counts() if self.multi_turn else {})

    def close(self) -> None:
        """Stop the engine and the reward's processes."""
        self.engine.close()
        self.scorer.close()


def training_settings(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, step: int, round_number: int = 0
) -> SamplingSettings:
    """How step `step` samples; the seed differs by step, data-parallel rank and the step's round of sampling alone."""
    rollout, purpose = recipe.rollout, "rollout" if round_number == 0 else f"rollout, round {round_number}"
    return SamplingSettings(
        max_response_tokens=rollout.max_response_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        stop_token_ids=stop_token_ids(recipe.model.path, tokenizer),
        seed=derived_seed(recipe.seed, purpose, step, parallel.data_rank()),
    )


def evaluation_settings(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> SamplingSettings:
    """How evaluations sample: with the same seed each time, so that two of them differ by the policy alone."""
    return SamplingSettings(
        max_response_tokens=recipe.rollout.max_response_tokens,
        temperature=recipe.evaluation.temperature,
        stop_token_ids=stop_token_ids(recipe.model.path, tokenizer),
        seed=derived_seed(recipe.seed, "evaluation", 0, parallel.data_rank()),
    )


def derived_seed(seed: int, purpose: str, step: int, rank: int) -> int:
    """A seed of its own for every purpose, step and rank, from the recipe's; fits torch's 63 bits."""
    sequence = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), step, rank])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside the model.

    Raises:
        UserError: there is none, it is broken, it has no end-of-sequence token, or it has tokens the model has not.
    """
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
    if not any((path / name).is_file() for name in names):
        raise UserError(f"model.path: {path} holds no tokenizer; accepted: a directory with a tokenizer.json")
    for name in names:
        if (path / name).is_file():
            read_json(path / name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"model.path: the tokenizer in {path} cannot be loaded: {error}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.path: the tokenizer in {path} has no end-of-sequence token (eos_token)")
    largest, vocabulary = max(tokenizer.get_vocab().values()), read_json(path / "config.json")["vocab_size"]
    if largest >= vocabulary:
        raise UserError(
            f"model.path: the tokenizer in {path} has token ids up to {largest}, but config.json says vocab_size "
            f"{vocabulary}; accepted: a tokenizer whose every token the model has"
        )
    return tokenizer


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file.

    Raises:
        UserError: it is not one.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"model.path: {path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"model.path: {path} holds a {type(content).__name__}; accepted: a JSON object")
    return content


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills a micro-batch up; never attended to from outside the padding, never learned from."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def stop_token_ids(path: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end a response: the tokenizer's, and those the checkpoint's generation settings name."""
    found = {int(tokenizer.eos_token_id)}
    settings = path / "generation_config.json"
    if settings.is_file():
        named = read_json(settings).get("eos_token_id")
        named = named if isinstance(named, list) else [] if named is None else [named]
        if not all(isinstance(token, int) for token in named):
            raise UserError(f"model.path: {settings}: eos_token_id is {named}; accepted: token ids, which are integers")
        found.update(named)
    return tuple(sorted(found))
