"""Expert volatility on a probe: the same responses under the old policy and the new one, both routing naturally (§5.3).

In: some of the step's responses, the policy before, between and after its updates. Out: how many experts changed after
one update and after each of the others, beside what two measurements of one policy differ by; and what the changes do to the
importance ratios. The probe is forwarded without replay whatever the updates do, so arms with and without Routing Replay
compare like with like.

    before the updates       twice in one packing, once in another: the noise floor
    after each update        the change after 1, 2, … updates
    after the last update    with log w of every token; and once more with the old routes replayed, which splits log w
                             into what the weights did and what the routing did
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from megatron_gspo import parallel
from megatron_gspo.config import Recipe
from megatron_gspo.platform import device
from megatron_gspo.routing.ratio_statistics import RatioStatistics
from megatron_gspo.routing.record import MicroBatchRoutes
from megatron_gspo.routing.volatility_metrics import NOISE_FLOOR, POLICY_CHANGE, ChangeNames, summarize
from megatron_gspo.training.experience import Experience, pack_samples
from megatron_gspo.training.forward import token_log_probs
from megatron_gspo.training.optimizer import TrainablePolicy
from megatron_gspo.training.routing import Comparison, RoutingControl
from megatron_gspo.types import MicroBatch, Sample

REPACKED_NOISE_FLOOR = ChangeNames("routing/noise_floor_repacked", "routing/noise_floor_repacked_tokens_any_change")


@dataclass(frozen=True)
class _Measurement:
    """One pass of the probe: what the routers chose, and log-probs on the last pipeline stage."""

    routes: list[MicroBatchRoutes]
    log_probs: list[torch.Tensor]


@dataclass(frozen=True)
class ProbeResult:
    """What a step's probe came to; the same on every rank."""

    metrics: dict[str, float]
    arrays: dict[str, np.ndarray]


class Probe:
    """One step's probe: `before_updates`, then `after_update` for each update, then `result`."""

    def __init__(
        self, control: RoutingControl, policy: TrainablePolicy, experience: Experience, recipe: Recipe
    ) -> None:
        self._control = control
        self._policy = policy
        self._recipe = recipe
        # Every n-th response of the step: of all mini-batches, and the same ones however the ranks share them.
        num_responses = recipe.training.prompts_per_step * recipe.rollout.responses_per_prompt
        stride = max(1, num_responses // recipe.routing.probe_responses)
        of_step = [sample for mini_batch in experience.samples for sample in mini_batch]
        samples = [sample for sample in of_step if sample.index % stride == 0]
        self._micro_batches = self._pack(samples, recipe.training.tokens_per_micro_batch)
        self._repacked = self._pack(samples, max(1, sum(sample.num_tokens for sample in samples) // 3))
        self._comparisons: dict[ChangeNames, Comparison] = {}

    def before_updates(self) -> None:
        """Measure the old policy, and how much two measurements of it differ."""
        self._old = self._measure(self._micro_batches)
        self._compare(NOISE_FLOOR, self._measure(self._micro_batches))
        self._compare_repacked(self._measure(self._repacked))

    def after_update(self, number: int) -> None:
        """Measure the change that the step's updates up to `number`, from 0, have made."""
        self._newest = self._measure(self._micro_batches)
        self._compare(POLICY_CHANGE.suffixed(f"_after_update_{number + 1}"), self._newest)

    def result(self) -> ProbeResult:
        """What all of the step's updates changed, and what that did to the importance ratios of the probe."""
        new = self._newest
        with self._control.taps.replay(self._old.routes, self._micro_batches):
            replayed = self._log_probs(self._micro_batches)
        layout = self._control.layout
        after_step = Comparison.empty(layout)
        num_replaced = self._compare_into(after_step, new, with_margins=True)
        total = after_step.over_ranks(layout)
        _, arrays = total.results(POLICY_CHANGE)
        metrics = summarize(total.change, total.rerouted, POLICY_CHANGE)
        metrics |= self._ratio_metrics(num_replaced, new.log_probs, replayed)
        for names, comparison in self._comparisons.items():
            more_metrics, more_arrays = comparison.over_ranks(layout).results(names)
            metrics |= more_metrics
            arrays |= more_arrays
        return ProbeResult(metrics, arrays)

    def _pack(self, samples: Sequence[Sample], token_budget: int) -> tuple[MicroBatch, ...]:
        return pack_samples(samples, self._recipe, pad_token_id=0, token_budget=token_budget)

    def _measure(self, micro_batches: Sequence[MicroBatch]) -> _Measurement:
        with self._control.taps.record(micro_batches, margins=True) as session:
            log_probs = self._log_probs(micro_batches)
        return _Measurement(session.natural_routes, log_probs)

    def _log_probs(self, micro_batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        return token_log_probs(self._policy.chunks, micro_batches, temperature=self._recipe.rollout.temperature)

    def _compare(self, names: ChangeNames, new: _Measurement) -> None:
        self._comparisons[names] = Comparison.empty(self._control.layout)
        self._compare_into(self._comparisons[names], new, with_margins=False)

    def _compare_into(self, comparison: Comparison, new: _Measurement, *, with_margins: bool) -> list[torch.Tensor]:
        """Compare with the old policy; returns the experts replaced over all layers, one [T] a micro-batch."""
        num_replaced = []
        for micro_batch, old_routes, new_routes in zip(self._micro_batches, self._old.routes, new.routes, strict=True):
            old, margins = self._control.response_routes(micro_batch, old_routes)
            experts, _ = self._control.response_routes(micro_batch, new_routes)
            margins = margins if with_margins else None
            num_replaced.append(comparison.add(self._control.layout, micro_batch, old, experts, margins))
        return num_replaced

    def _compare_repacked(self, repacked: _Measurement) -> None:
        """Compare the old policy's routes in the probe's packing with those in the other."""
        elsewhere = {
            sample: experts
            for micro_batch, routes in zip(self._repacked, repacked.routes, strict=True)
            for sample, experts in self._by_sample(micro_batch, routes)
        }
        comparison = Comparison.empty(self._control.layout)
        for micro_batch, routes in zip(self._micro_batches, self._old.routes, strict=True):
            here = dict(self._by_sample(micro_batch, routes))
            old = torch.cat([*here.values(), self._no_routes()])
            new = torch.cat([*(elsewhere[sample] for sample in here), self._no_routes()])
            comparison.add(self._control.layout, micro_batch, old, new)
        self._comparisons[REPACKED_NOISE_FLOOR] = comparison

    def _by_sample(self, micro_batch: MicroBatch, routes: MicroBatchRoutes) -> Iterator[tuple[int, torch.Tensor]]:
        """Each sample's index and the routes of its response, [response, L, K]."""
        experts, _ = self._control.response_routes(micro_batch, routes)
        bounds = micro_batch.response_cu_seqlens.tolist()
        for sample, (start, end) in zip(micro_batch.sample_indices, pairwise(bounds), strict=True):
            yield sample, experts[start:end]

    def _no_routes(self) -> torch.Tensor:
        """[0, L, K], for a micro-batch without a response."""
        layout = self._control.layout
        return torch.zeros(0, len(layout.rank_layers), layout.top_k, dtype=torch.int16, device=device())

    def _ratio_metrics(
        self, num_replaced: list[torch.Tensor], new: list[torch.Tensor], replayed: list[torch.Tensor]
    ) -> dict[str, float]:
        """What routing change does to log w and log s (eqs. 3 and 8), token by token and response by response."""
        layout = self._control.layout
        statistics = RatioStatistics.of(
            torch.zeros(0), torch.zeros(0), torch.zeros(0), torch.zeros(1, dtype=torch.int64)
        )
        if parallel.reports_metrics():
            rows = zip(self._micro_batches, num_replaced, self._old.log_probs, new, replayed, strict=True)
            for micro_batch, replaced, old, natural, fixed in rows:
                rate = replaced.cpu() / (layout.top_k * len(layout.moe_layers))
                cu_seqlens = micro_batch.response_cu_seqlens.cpu()
                statistics += RatioStatistics.of(rate, (natural - old).cpu(), (fixed - old).cpu(), cu_seqlens)
        total = statistics.from_vector(parallel.sum_over_all_ranks(statistics.to_vector()).cpu())
        return total.metrics()
