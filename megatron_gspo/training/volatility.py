"""Everything about routes in one step, in the order the step calls for it.

In: the step's experience and mini-batches. Out: contexts for the old-policy pass and each update, and at the end the
step's routing metrics and the arrays of `volatility/step_*.npz`. A dense model has none of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from megatron_gspo.config import Recipe
from megatron_gspo.training.experience import Experience, MiniBatch
from megatron_gspo.training.optimizer import TrainablePolicy
from megatron_gspo.training.probe import Probe, ProbeResult
from megatron_gspo.training.routing import RoutingControl
from megatron_gspo.training.step_metrics import Stopwatch


class StepVolatility:
    """One step's routes: `old_policy_pass`, then for each mini-batch `update_pass` and `after_update`, then `results`."""

    def __init__(
        self,
        control: RoutingControl | None,
        policy: TrainablePolicy,
        recipe: Recipe,
        experience: Experience,
        mini_batches: Sequence[MiniBatch],
        step: int,
        clock: Stopwatch,
    ) -> None:
        """Measure the old policy on the probe, where this step has one. `control` is None for a dense model."""
        self._control = control
        self._mini_batches = mini_batches
        self._has_old_policy_pass = recipe.rollout.old_log_probs == "trainer"
        self._clock = clock
        self._probe: Probe | None = None
        self._probed: ProbeResult | None = None
        if control is None:
            return
        self._routes = control.begin_step(experience, mini_batches)
        if control.measures and step % recipe.routing.probe_every == 0:
            with clock.measure("volatility"):
                self._probe = Probe(control, policy, experience, recipe)
                self._probe.before_updates()

    def old_policy_pass(self) -> AbstractContextManager[None]:
        """Around the old-policy pass; without one (the engine's log-probs are used) there is nothing to record."""
        if self._control is None or not self._has_old_policy_pass:
            return nullcontext()
        return self._control.old_policy_pass(self._routes, self._mini_batches)

    def update_pass(self, number: int) -> AbstractContextManager[None]:
        """Around the forward and backward passes of mini-batch `number`, from 0."""
        if self._control is None:
            return nullcontext()
        return self._control.update_pass(self._routes, number, self._mini_batches[number])

    def after_update(self, number: int) -> None:
        """Measure the probe."""
        if self._probe is None:
            return
        with self._clock.measure("volatility"):
            self._probe.after_update(number)
            if number == len(self._mini_batches) - 1:
                self._probed = self._probe.result()

    def results(self) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """The step's routing metrics and arrays, of all ranks. Every rank takes part."""
        if self._control is None:
            return {}, {}
        metrics, arrays = self._control.results(self._routes)
        if self._probed is None:
            return metrics, arrays
        return metrics | self._probed.metrics, arrays | self._probed.arrays
