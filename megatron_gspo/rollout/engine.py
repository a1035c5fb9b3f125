"""What the training loop asks of a rollout engine, whether it is a model in this process or servers behind HTTP.

In: prompts and sampling settings; now and then the policy's new weights. Out: groups of responses with the log-probs of
the policy that sampled them (π_θold of eqs. 3 and 8 when `rollout.old_log_probs` is `engine`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from megatron_gspo.types import OpenGroup, Prompt, Response, SamplingSettings, TrainingFailedError


class EngineGoneError(TrainingFailedError):
    """No part of the engine has answered for as long as the recipe allows. It may later: the run can go on then."""


class RolloutEngine(Protocol):
    """Samples responses from the policy it was last given. Engines derive from it.

    What every engine promises of a response:

    - `token_ids` are the ids that were sampled, never text turned back into tokens. They end with the stop token when
      `finish_reason` is "stop". "length" means that `max_response_tokens` were sampled and none is a stop token; "abort"
      that the engine gave up before either, and the caller decides what such a response is worth.
    - `log_probs` are of the distribution softmax(logits / temperature) over the whole vocabulary. `top_p` and `top_k`
      restrict what can be sampled but do not renormalise them: the trainer recomputes the same quantity without knowing
      the restriction. At temperature 0, where sampling is greedy, they are taken at temperature 1.
    - `version_spans` say which version of the weights sampled each of its tokens: one version all of them, unless
      `generate_until` was given its beginning.
    - `routed_experts` is given by an engine that was built to return it, and None otherwise: the experts [prompt +
      response - 1, L, K] that sampling sent each token to, in uint8 up to 256 experts and uint16 above. L counts MoE
      layers from the first to the last; dense layers have no entry. The last token was never fed back, so it has none.
      Where several versions sampled a response, each token's are those of the version that sampled the token after it.
    """

    @property
    def weight_version(self) -> int:
        """The version last passed to `update_weights`. RuntimeError before the first update has succeeded."""

    def generate(
        self, prompts: Sequence[Prompt], responses_per_prompt: int, settings: SamplingSettings
    ) -> list[tuple[Response, ...]]:
        """Sample `responses_per_prompt` responses (G) to each prompt.

        Returns one tuple of G responses a prompt, in the order of `prompts`. A prompt may occur more than once.
        RuntimeError when there are no weights to sample from; EngineGoneError where the engine can come to lie elsewhere.
        """
        done = self.generate_until(
            [OpenGroup.of(prompt, responses_per_prompt) for prompt in prompts], len(prompts), settings
        )
        return [group.begun for group in done]

    def generate_until(
        self,
        groups: Sequence[OpenGroup],
        num_complete: int,
        settings: SamplingSettings,
        interrupt: threading.Event | None = None,
    ) -> list[OpenGroup]:
        """Sample until `num_complete` of the groups are complete, or, from another thread, `interrupt` is set.

        Groups are begun in their order. Responses that have begun go on from their tokens, which stay as they were
        sampled, with their log-probs and routes; those at their end are left alone.

        Returns the same groups in the same order, as far as they have come: at least `num_complete` of them complete,
        unless interrupted. No response is lost, and none is in work any more. RuntimeError as `generate`.
        """

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace the policy.

        `weights` yields every parameter once, whole, under the name it has in a Hugging Face checkpoint (each expert's
        matrices under the expert's own names). It is consumed as it comes, so neither side holds a second copy of the
        model; a tensor stays as it is until this returns. UserError or TrainingFailedError when they cannot be used (a
        parameter is missing, unknown, given twice or of the wrong shape; a server refuses them); the engine then refuses
        to generate until an update succeeds, because it may hold parts of two policies.
        """

    def release_memory(self) -> None:
        """Give back, until the next `update_weights`, what memory an engine that shares the trainer's devices can spare.

        To be called when no process of the run has a response under way. Generating before the update is a RuntimeError
        where memory was given back.
        """

    def take_counts(self) -> dict[str, float]:
        """What happened since this was last asked, as counts by metric name; empty where nothing can happen."""

    def close(self) -> None:
        """Give back memory and processes. Closing twice is allowed; generating afterwards is a RuntimeError."""
