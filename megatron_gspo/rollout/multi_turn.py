"""Responses of several turns: the policy samples, an environment answers, the policy goes on.

In: prompts, any rollout engine, what makes environments. Out: responses as `engine.RolloutEngine` promises them, whose
tokens are the turns' and the environment's in between, told apart by `Response.is_sampled`:

    prompt | sampled … stop | observation … | sampled … stop | observation … | sampled …

A turn is one `generate` of the engine for all unfinished responses at once, whose prompts are what was read so far. Token
ids go back in as they came out; only an environment's text is turned into tokens. A token's log-prob and route are those
it was sampled with; a token that was only read (an observation's, a turn's last) has the route of the turn that read it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_gspo.rollout.engine import RolloutEngine
from megatron_gspo.rollout.environments import Environment, EnvironmentFactory, Observation
from megatron_gspo.types import FinishReason, Prompt, Response, SamplingSettings, UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Environments that are asked at the same time.
MAX_THREADS = 64


@dataclass
class _Episode:
    """One response as far as it has come."""

    prompt: Prompt
    environment: Environment
    turns: list[Response] = field(default_factory=list)
    token_ids: list[np.ndarray] = field(default_factory=list)  # of turns and observations, in order
    log_probs: list[np.ndarray] = field(default_factory=list)
    is_sampled: list[np.ndarray] = field(default_factory=list)
    token_rewards: list[np.ndarray] = field(default_factory=list)
    finish_reason: FinishReason | None = None  # None while it goes on
    has_failed: bool = False  # its environment did

    def read(self, observation: Sequence[int]) -> None:
        """Append an environment's tokens."""
        self._append(np.array(observation, dtype=np.int64), np.zeros(len(observation), np.float32), sampled=False)

    def sampled(self, turn: Response) -> None:
        """Append a turn."""
        self.turns.append(turn)
        self._append(turn.token_ids, turn.log_probs, sampled=True)

    def rewarded(self, reward: float) -> None:
        """Give the turn that was sampled last its reward."""
        self.token_rewards[-1][-1] = reward

    def history(self) -> Prompt:
        """What the next turn follows."""
        return replace(self.prompt, token_ids=(*self.prompt.token_ids, *np.concatenate(self.token_ids).tolist()))

    def response(self) -> Response:
        """The whole of it."""
        assert self.finish_reason is not None, "it is over"
        return replace(
            self.turns[-1],
            prompt_id=self.prompt.id,
            token_ids=np.concatenate(self.token_ids),
            log_probs=np.concatenate(self.log_probs),
            finish_reason=self.finish_reason,
            routed_experts=self._routes(),
            is_sampled=np.concatenate(self.is_sampled),
            token_rewards=np.concatenate(self.token_rewards),
        )

    def _append(self, token_ids: np.ndarray, log_probs: np.ndarray, *, sampled: bool) -> None:
        self.token_ids.append(token_ids)
        self.log_probs.append(log_probs)
        self.is_sampled.append(np.full(len(token_ids), sampled))
        self.token_rewards.append(np.zeros(len(token_ids), dtype=np.float32))

    def _routes(self) -> np.ndarray | None:
        """[prompt + tokens - 1, L, K]: of each token from the first turn that has it, which is the one that sampled it."""
        routes: list[np.ndarray] = []
        for turn in self.turns:
            if turn.routed_experts is None:
                return None
            routes.append(turn.routed_experts[sum(map(len, routes)) :])
        return np.concatenate(routes)


class MultiTurn:
    """Samples responses of several turns from a rollout engine, which stays its owner's to update and to close."""

    def __init__(
        self,
        engine: RolloutEngine,
        make_environment: EnvironmentFactory,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_turns: int,
        max_observation_tokens: int,
    ) -> None:
        """
        Args:
            engine: what samples each turn.
            make_environment: makes one environment a response.
            tokenizer: the model's.
            max_turns: a response of more turns ends there, unfinished.
            max_observation_tokens: an observation is cut after as many.

        Raises:
            UserError: as `require_stop_tokens`.
        """
        self._engine = engine
        self._make_environment = make_environment
        self._tokenizer = tokenizer
        self._max_turns = max_turns
        self._max_observation_tokens = max_observation_tokens
        self._stop_token_ids = require_stop_tokens(make_environment, tokenizer)
        self._counts: Counter[str] = Counter()

    def generate(
        self, prompts: Sequence[Prompt], responses_per_prompt: int, settings: SamplingSettings
    ) -> list[tuple[Response, ...]]:
        """See `RolloutEngine.generate`; `settings.max_response_tokens` bounds a turn.

        A response that ran into a limit in its last turn, or whose last turn still asked something, has finish reason
        "length"; one whose environment failed has "abort".
        """
        settings = replace(settings, stop_token_ids=tuple(sorted({*settings.stop_token_ids, *self._stop_token_ids})))
        groups = [
            [_Episode(prompt, self._make_environment()) for _ in range(responses_per_prompt)] for prompt in prompts
        ]
        episodes = [episode for group in groups for episode in group]
        with ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="environment") as threads:
            for episode, answer in zip(episodes, threads.map(self._reset, episodes), strict=True):
                if answer is not None and answer.text:
                    episode.read(self._tokens_of(answer))
            for turn in range(self._max_turns):
                going_on = [episode for episode in episodes if episode.finish_reason is None]
                if not going_on:
                    break
                for episode, response in zip(going_on, self._sample(groups, going_on, settings, turn), strict=True):
                    episode.sampled(response)
                    if response.finish_reason != "stop":
                        episode.finish_reason = response.finish_reason
                self._answer([episode for episode in going_on if episode.finish_reason is None], turn, threads)
        return [tuple(episode.response() for episode in group) for group in groups]

    def take_counts(self) -> dict[str, float]:
        """Environments that failed since this was last asked, by metric name."""
        counts = {"rollout/num_environment_failures": float(self._counts["failures"])}
        self._counts.clear()
        return counts

    def _sample(
        self, groups: Sequence[Sequence[_Episode]], going_on: Sequence[_Episode], settings: SamplingSettings, turn: int
    ) -> list[Response]:
        """The next turn of each episode that goes on."""
        # Each turn draws anew; the first as a response of one turn does.
        settings = settings if turn == 0 else replace(settings, seed=_seed_of_turn(settings.seed, turn))
        if all(not episode.token_ids for episode in going_on):  # then the prompts are read once a group
            sampled = self._engine.generate([group[0].prompt for group in groups], len(groups[0]), settings)
        else:
            sampled = self._engine.generate([episode.history() for episode in going_on], 1, settings)
        return [response for group in sampled for response in group]

    def _answer(self, asking: Sequence[_Episode], turn: int, threads: ThreadPoolExecutor) -> None:
        """Have the environments answer the turns that ended by themselves."""
        is_last = turn + 1 == self._max_turns
        for episode, answer in zip(asking, threads.map(self._step, asking), strict=True):
            if answer is None:
                episode.finish_reason = "abort"
                continue
            episode.rewarded(answer.reward)
            if answer.done:
                episode.finish_reason = "stop"
            elif is_last:
                episode.finish_reason = "length"
            else:
                episode.read(self._tokens_of(answer))

    def _reset(self, episode: _Episode) -> Observation | None:
        return self._guarded(episode, lambda: episode.environment.reset(episode.prompt))

    def _step(self, episode: _Episode) -> Observation | None:
        """The answer to the turn sampled last; None where the environment failed."""
        text = self._tokenizer.decode(episode.turns[-1].token_ids, skip_special_tokens=True)

        def answer() -> Observation | None:
            if episode.has_failed:
                return None  # in its reset
            given = episode.environment.step(text)
            if not np.isfinite(given.reward) or not (given.done or given.text):
                raise ValueError(f"it answered {given}; accepted: a finite reward, and text unless it is done")
            return given

        return self._guarded(episode, answer)

    def _guarded(self, episode: _Episode, ask: Callable[[], T]) -> T | None:
        """What the environment answers; None, counted, where it fails."""
        try:
            return ask()
        except Exception as error:  # it is the user's: it may fail in any way
            episode.has_failed = True
            self._counts["failures"] += 1
            logger.warning("the environment failed over a response to %s: %r", episode.prompt.id, error)
            return None

    def _tokens_of(self, observation: Observation) -> list[int]:
        tokens: list[int] = self._tokenizer.encode(observation.text, add_special_tokens=False)
        return tokens[: self._max_observation_tokens]


def require_stop_tokens(make_environment: EnvironmentFactory, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens of the environment's stop texts.

    Raises:
        UserError: one of them is not one token.
    """
    found = []
    for text in make_environment().stop_texts:
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        if len(token_ids) != 1:
            raise UserError(
                f"environment.name: a turn is to end at {text!r}, which is {len(token_ids)} tokens of the model's "
                "tokenizer; accepted: stop texts of one token"
            )
        found.append(int(token_ids[0]))
    return tuple(found)


def _seed_of_turn(seed: int, turn: int) -> int:
    return int(np.random.SeedSequence([seed, turn]).generate_state(1, np.uint64)[0] >> np.uint64(1))
