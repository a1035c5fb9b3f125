"""What passes between the stages of a training step.

Every hand-off is a small frozen dataclass; the comment behind a field gives its shape, dtype and unit.
Shape legend: S tokens in a packed micro-batch (prompts, responses and padding), T response tokens in it,
N responses in it, G responses a prompt, L MoE layers, K activated experts a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

if TYPE_CHECKING:
    import torch  # annotations only: tasks and the reward worker start without it

FinishReason = Literal["stop", "length", "abort"]


class UserError(Exception):
    """Something the user gave is wrong. The command line prints the message alone and exits with status 2."""

    said_elsewhere: ClassVar[bool] = False  # by another rank, so that this one stays silent


class TrainingFailedError(Exception):
    """Training cannot go on, and why is understood. The command line prints the message alone and exits with status 1."""

    of_all_ranks: ClassVar[bool] = False  # every rank fails alike, and the first says so for all


@dataclass(frozen=True)
class Prompt:
    """One problem: what the policy reads, and what its response is checked against."""

    id: str  # where it came from, unique in a run: "train.jsonl:17", "arithmetic_chain:5"
    token_ids: tuple[int, ...]
    text: str
    answer: str
    metadata: Mapping[str, object] = field(default_factory=dict)
    position: int = 0  # in the order that its stream is walked in, over all epochs


@dataclass(frozen=True)
class SamplingSettings:
    """How responses are sampled. Log-probs are of the distribution at this temperature, before top-p and top-k cut it."""

    max_response_tokens: int
    temperature: float = 1.0  # 0 picks the most likely token
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps every token
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class VersionSpan:
    """Tokens [start, end) of a response, all sampled by one policy version."""

    version: int
    start: int
    end: int


@dataclass(frozen=True)
class Response:
    """One sampled response to a prompt, exactly as the rollout engine produced it.

    One of several turns holds what an environment answered too; it begins or goes on with a sampled token behind that, and
    ends with one.
    """

    prompt_id: str
    token_ids: np.ndarray  # [tokens] int64; ends with the stop token when finish_reason is "stop"
    log_probs: np.ndarray  # [tokens] float32, log-prob of each token under the policy that sampled it; 0 where none did
    finish_reason: FinishReason
    weight_version: int  # the policy version that sampled it; where `earlier` ones did in part, the last tokens'
    routed_experts: np.ndarray | None = None  # [prompt + tokens - 1, L, K]; the last token has no route
    earlier: tuple[VersionSpan, ...] = ()  # from token 0 on, the tokens that earlier versions sampled
    is_sampled: np.ndarray | None = None  # [tokens] bool, False for an environment's tokens; None where there are none
    token_rewards: np.ndarray | None = None  # [tokens] float32, an environment's, each at the last token of its turn

    def __post_init__(self) -> None:
        assert self.token_ids.ndim == 1 and len(self.token_ids) > 0, "a response has at least one token"
        assert self.token_ids.shape == self.log_probs.shape, "one log-prob a response token"
        assert self.is_sampled is None or self.is_sampled[-1], "a response ends with a token of the policy"

    @property
    def num_sampled_tokens(self) -> int:
        """|y| of the paper: tokens that the policy sampled."""
        return len(self.token_ids) if self.is_sampled is None else int(self.is_sampled.sum())

    @property
    def num_turns(self) -> int:
        """Stretches of sampled tokens."""
        if self.is_sampled is None:
            return 1
        begins = self.is_sampled & ~np.concatenate([[False], self.is_sampled[:-1]])
        return int(begins.sum())

    @property
    def last_turn_token_ids(self) -> np.ndarray:
        """What was sampled after the last token of an environment; all tokens where there is none."""
        if self.is_sampled is None or self.is_sampled.all():
            return self.token_ids
        return self.token_ids[int(np.flatnonzero(~self.is_sampled)[-1]) + 1 :]

    @property
    def environment_reward(self) -> float:
        """The sum of an environment's rewards."""
        return 0.0 if self.token_rewards is None else float(self.token_rewards.sum())

    @property
    def version_spans(self) -> tuple[VersionSpan, ...]:
        """Which policy version sampled which tokens: all of them, in order, no two neighbours of one version."""
        start = self.earlier[-1].end if self.earlier else 0
        return (*self.earlier, VersionSpan(self.weight_version, start, len(self.token_ids)))

    @property
    def token_versions(self) -> np.ndarray:
        """The policy version that sampled each token: [tokens] int64."""
        spans = self.version_spans
        return np.repeat([span.version for span in spans], [span.end - span.start for span in spans])


@dataclass(frozen=True)
class OpenGroup:
    """A prompt's G responses while they are sampled, which may take longer than a step."""

    prompt: Prompt
    responses: tuple[Response | None, ...]  # [G]; "abort": as far as it has come; None: not begun

    @property
    def is_complete(self) -> bool:
        """Whether every response has come to its end."""
        return all(response is not None and response.finish_reason != "abort" for response in self.responses)

    @property
    def begun(self) -> tuple[Response, ...]:
        """The responses that have tokens, in order; of a complete group all G."""
        return tuple(response for response in self.responses if response is not None)

    @classmethod
    def of(cls, prompt: Prompt, num_responses: int) -> OpenGroup:
        """A group of which nothing is sampled yet."""
        return cls(prompt, (None,) * num_responses)


@dataclass(frozen=True)
class Group:
    """The G responses to one prompt, with their rewards and advantages (eq. 7)."""

    prompt: Prompt
    responses: tuple[Response, ...]
    rewards: np.ndarray  # [G] float32, as the reward function gave them
    advantages: np.ndarray  # [G] float32
    penalties: np.ndarray | None = None  # [G] float32, at most 0: added to the rewards before the advantages
    # of each response [tokens] float32, where they differ along responses (eq. 14)
    token_advantages: tuple[np.ndarray, ...] | None = None

    def __post_init__(self) -> None:
        assert len(self.responses) == len(self.rewards) == len(self.advantages), "one reward and advantage a response"

    @property
    def teaches(self) -> bool:
        """Whether its responses differ in what they are worth: in a group of equal ones every advantage is exactly 0."""
        return bool(self.advantages.any()) or any(bool(of_tokens.any()) for of_tokens in self.token_advantages or ())


@dataclass(frozen=True)
class Sample:
    """One training sequence: a prompt with one of its responses. What packing arranges into micro-batches."""

    index: int  # the response's position in the step, unique across data-parallel ranks
    prompt_token_ids: np.ndarray  # [prompt] int64
    response_token_ids: np.ndarray  # [response] int64
    advantage: float
    behaviour_log_probs: np.ndarray  # [response] float32, from the rollout engine
    routed_experts: np.ndarray | None = None  # `Response.routed_experts`
    staleness: np.ndarray | None = None  # [response] int64, policy versions since each token was sampled; None: all 0
    is_sampled: np.ndarray | None = None  # [response] bool; only these tokens are learned from; None for all
    token_advantages: np.ndarray | None = None  # [response] float32, in place of `advantage`; read where sampled

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens together."""
        return len(self.prompt_token_ids) + len(self.response_token_ids)

    @property
    def num_sampled_tokens(self) -> int:
        """Tokens that are learned from: |y| of the paper."""
        return len(self.response_token_ids) if self.is_sampled is None else int(self.is_sampled.sum())


@dataclass(frozen=True)
class MicroBatch:
    """Samples packed one after the other (`thd`), on the model's device.

    A response token at packed position p is predicted by the hidden state at p - 1; `predicting_positions` holds those
    p - 1, in packing order, so prompt tokens and padding never reach the output layer. Nor do tokens that an environment
    wrote into a response: the model reads them, and for everything behind it they are not among the T. Padding, where the packed length
    must be a multiple of something, is a segment of its own at the end; where each segment's length must be, it also ends
    the segments of samples, whose tokens never attend to it.

    It is whole, and the same on every rank of a copy of the model: what a context- or tensor-parallel rank holds of it is
    cut by the model.
    """

    token_ids: torch.Tensor  # [S] int64
    is_sample_token: torch.Tensor  # [S] bool; False for padding
    position_ids: torch.Tensor  # [S] int64, from 0 in every segment
    segment_cu_seqlens: torch.Tensor  # [segments + 1] int32; N samples, and at most one of padding alone
    max_segment_tokens: int
    predicting_positions: torch.Tensor  # [T] int64 into S
    target_token_ids: torch.Tensor  # [T] int64, the response tokens
    response_cu_seqlens: torch.Tensor  # [N + 1] int64; response i owns T[cu[i]:cu[i + 1]]
    sample_indices: tuple[int, ...]  # [N] `Sample.index` of each response
    advantages: torch.Tensor  # [N] float32; or [T], where they differ along responses
    behaviour_log_probs: torch.Tensor  # [T] float32
    num_padding_tokens: int = 0
    staleness: torch.Tensor | None = None  # [T] int64, `Sample.staleness`; None: all 0

    @property
    def num_responses(self) -> int:
        """N; zero for a micro-batch that only keeps this rank in step with the others."""
        return len(self.sample_indices)
