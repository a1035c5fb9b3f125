"""What the supervised cold start imitates.

In: the same tasks and files as `prompts`. Out: tokenized prompts with tokenized responses that end with the
end-of-sequence token. A task writes its demonstrations, a share of their steps wrong on purpose; a file's are
its worked answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_gspo.config import DataSection
from megatron_gspo.data.problems import ProblemSource
from megatron_gspo.data.prompts import ProblemWalk, PromptEncoder, Turn, open_source
from megatron_gspo.types import Sample

_MISTAKE_STREAM = 5  # random streams 1 to 4 are the tasks' splits and the shuffle


@dataclass(frozen=True)
class Demonstration:
    """A prompt and a response to imitate."""

    prompt_token_ids: tuple[int, ...]
    response_token_ids: tuple[int, ...]  # ends with the end-of-sequence token

    def sample(self, index: int) -> Sample:
        """The sample that packing takes. Supervised learning has no advantage and no behaviour policy: both are 0."""
        return Sample(
            index=index,
            prompt_token_ids=np.array(self.prompt_token_ids, dtype=np.int64),
            response_token_ids=np.array(self.response_token_ids, dtype=np.int64),
            advantage=0.0,
            behaviour_log_probs=np.zeros(len(self.response_token_ids), dtype=np.float32),
        )


class DemonstrationStream:
    """Demonstrations in an order that the seed alone decides."""

    def __init__(
        self,
        source: ProblemSource,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: bool,
        shuffle: bool,
        max_prompt_tokens: int,
        max_response_tokens: int,
        seed: int,
        wrong_step_fraction: float,
    ) -> None:
        self.name = source.name
        self._source = source
        self._tokenizer = tokenizer
        self._encoder = PromptEncoder(tokenizer, chat_template=chat_template)
        self._max_prompt_tokens = max_prompt_tokens
        self._max_response_tokens = max_response_tokens
        self._seed = seed
        self._wrong_step_fraction = wrong_step_fraction
        self._walk = ProblemWalk(source, seed=seed, shuffle=shuffle)

    @property
    def num_too_long(self) -> int:
        """Different problems met since opening whose prompt or response is too long."""
        return self._walk.num_left_out

    def next_demonstrations(self, num_demonstrations: int) -> list[Demonstration]:
        """The next demonstrations.

        Raises:
            UserError: every prompt or response is too long.
        """
        too_long = (
            f"has a prompt of more than {self._max_prompt_tokens} tokens (rollout.max_prompt_tokens) or a worked answer "
            f"of more than {self._max_response_tokens} (rollout.max_response_tokens)"
        )
        return [self._walk.next_kept(self._demonstration, too_long) for _ in range(num_demonstrations)]

    def _demonstration(self, turn: Turn) -> Demonstration | None:
        _, prompt = self._encoder.encode(turn.problem)
        rng = np.random.default_rng([_MISTAKE_STREAM, self._seed, turn.position])
        text = self._source.demonstration(turn.problem, rng, self._wrong_step_fraction)
        response = (*self._tokenizer(text, add_special_tokens=False)["input_ids"], self._tokenizer.eos_token_id)
        if len(prompt) > self._max_prompt_tokens or len(response) > self._max_response_tokens:
            return None
        return Demonstration(prompt, response)


def open_demonstrations(
    name_or_path: str,
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    max_response_tokens: int,
    seed: int,
    wrong_step_fraction: float,
) -> DemonstrationStream:
    """The demonstrations of `data.train`. A task's are of training problems, but other ones than `open_prompts` draws.

    Raises:
        UserError: naming the recipe's field, or the file and its line.
    """
    return DemonstrationStream(
        open_source(name_or_path, "data.train", data, seed=seed, split="demonstration"),
        tokenizer,
        chat_template=data.chat_template,
        shuffle=data.shuffle,
        max_prompt_tokens=max_prompt_tokens,
        max_response_tokens=max_response_tokens,
        seed=seed,
        wrong_step_fraction=wrong_step_fraction,
    )
