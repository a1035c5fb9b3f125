"""What may be wrong with a run: one pure function a suspicion, computed from its metrics and recipe.

In: a `RunRecord`. Out: one sentence with the numbers it rests on, or None. `CHECKS` lists them all; `check_run` runs them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_gspo.report.read import RunRecord, Series
from megatron_gspo.report.statistics import noise_std, trailing_mean

SEQUENCE_OBJECTIVES = ("gspo", "gspo_token")  # clip log s_i (eq. 8); others clip log w_{i,t} (eq. 3)

NEVER_CLIPS_FACTOR = 3.0  # clip bounds this much farther out than any ratio ever went
NOISE_FLOOR_FACTOR = 2.0
MISMATCH_GROWTH = 3.0
ROUND_OFF = 1e-5  # nats a token; a mismatch below it is float32's own
ENTROPY_LEFT = 0.1
SPIKE_FACTOR = 10.0
SPIKE_WINDOW = 20
SMOOTHING_STEPS = 5
COLLAPSE_SHARE = 0.5
COLLAPSE_NOISES = 3.0
ZERO_VARIANCE_LIMIT = 0.5


@dataclass(frozen=True)
class Check:
    """One suspicion: what is looked for, and the function that looks."""

    title: str
    rule: str  # when it fires
    find: Callable[[RunRecord], str | None]


@dataclass(frozen=True)
class RunWarning:
    """A suspicion that the run's numbers bear out."""

    title: str
    message: str


def check_run(run: RunRecord) -> list[RunWarning]:
    """All warnings of a run."""
    found = [(check.title, check.find(run)) for check in CHECKS]
    return [RunWarning(title, message) for title, message in found if message is not None]


def clip_range_never_clips(run: RunRecord) -> str | None:
    """No token was ever clipped, and the bounds lie far outside of what the ratio did. Needs several mini-batches."""
    clipped, ratio = run.series("clip/token_fraction"), run.series(f"ratio/{_unit(run)}_abs_log_max")
    bounds = _clip_bounds(run)
    if len(clipped) == 0 or len(ratio) == 0 or bounds is None or run.field("training.mini_batches") < 2:
        return None
    largest = float(ratio.values.max())
    if clipped.values.max() > 0 or min(bounds) < NEVER_CLIPS_FACTOR * largest:
        return None
    hint = "; a length-normalised ratio needs about 3e-4 and 4e-4" if _unit(run) == "sequence" else ""
    return (
        f"nothing was clipped in {len(clipped):,} steps: the largest {_unit(run)} |log ratio| was {largest:.2g}, the clip "
        f"range begins at {min(bounds):.2g}{hint}"
    )


def clip_range_below_mismatch(run: RunRecord) -> str | None:
    """The old log-probs are the engine's (§5.4), and the ratio at equal weights is spread wider than the clip range."""
    spread, bounds = run.series(f"mismatch/{_unit(run)}_log_std"), _clip_bounds(run)
    if run.field("rollout.old_log_probs") != "engine" or len(spread) == 0 or bounds is None:
        return None
    typical = float(np.median(spread.values))
    if typical <= min(bounds):
        return None
    return (
        f"at equal weights the engine's and the trainer's {_unit(run)} log-ratio is spread by {typical:.2g} already, the "
        f"clip range is {min(bounds):.2g}: the loss clips on noise. Widen it, or take rollout.old_log_probs=trainer"
    )


def replay_not_in_force(run: RunRecord) -> str | None:
    """`routing.replay` asks for it, and a step's routers were not given all of their routes."""
    asked, fraction = str(run.field("routing.replay")), run.series("routing/replayed_token_fraction")
    steps = run.series("reward/mean").steps
    if asked in ("off", "False") or len(steps) == 0:
        return None
    short = fraction.steps[fraction.values < 1.0]
    missing = np.setdiff1d(steps, fraction.steps)
    bad = np.union1d(short, missing)
    if len(bad) == 0:
        return None
    lowest = float(fraction.values.min()) if len(fraction) else 0.0
    return (
        f"routing.replay is {asked}, but in {len(bad):,} of {len(steps):,} steps not every token was replayed (as little "
        f"as {lowest:.1%}; first at step {bad[0]})"
    )


def change_at_noise_floor(run: RunRecord) -> str | None:
    """The change rate is no more than twice what two measurements of one policy differ by."""
    rate = run.series("routing/change_rate")
    floors = [run.series(f"routing/{name}") for name in ("noise_floor", "noise_floor_repacked")]
    if len(rate) == 0 or not any(len(floor) for floor in floors):
        return None
    typical = float(np.median(rate.values))
    floor = max(float(np.median(floor.values)) for floor in floors if len(floor))
    if typical > NOISE_FLOOR_FACTOR * floor:
        return None
    return (
        f"the median change rate, {typical:.3%}, does not stand out from its noise floor, {floor:.3%}: what looks like "
        "expert volatility may be round-off, or the policy does not move"
    )


def mismatch_rises(run: RunRecord) -> str | None:
    """Engine and trainer drift apart: the last quarter's median is three times the first's, beyond round-off."""
    mismatch = run.series("mismatch/log_prob_abs_mean")
    if len(mismatch) < 8:
        return None
    first, last = float(np.median(mismatch.start(0.25))), float(np.median(mismatch.end(0.25)))
    if last <= max(MISMATCH_GROWTH * first, ROUND_OFF):
        return None
    return (
        f"the engine's log-probs drift from the trainer's: {first:.2g} nats a token in the first quarter, {last:.2g} in "
        "the last"
    )


def entropy_collapses(run: RunRecord) -> str | None:
    """The last tenth's entropy is a tenth of the first's or less: sampling hardly explores."""
    entropy = run.series("entropy/mean")
    if len(entropy) < 5:
        return None
    first, last = float(np.median(entropy.start(0.1))), float(np.median(entropy.end(0.1)))
    if first <= 0 or last > ENTROPY_LEFT * first:
        return None
    below = entropy.steps[entropy.values <= ENTROPY_LEFT * first]
    return (
        f"entropy fell from {first:.3g} to {last:.3g} nats a token (a tenth of its start first at step {below[0]}): the "
        "policy hardly explores any more"
    )


def gradient_spikes(run: RunRecord) -> str | None:
    """A gradient norm ten times the median of the up to 20 steps before it (at least 5)."""
    norm = run.series("grad_norm")
    spikes = []
    for index in range(5, len(norm)):
        before = float(np.median(norm.values[max(0, index - SPIKE_WINDOW) : index]))
        if before > 0 and norm.values[index] > SPIKE_FACTOR * before:
            spikes.append(index)
    if not spikes:
        return None
    worst = max(spikes, key=lambda index: norm.values[index])
    return (
        f"the gradient norm jumped to more than {SPIKE_FACTOR:.0f} times its usual size at {_steps(norm.steps[spikes])}; "
        f"the largest is {norm.values[worst]:.3g}, at step {norm.steps[worst]}"
    )


def reward_collapses(run: RunRecord) -> str | None:
    """The reward lost half of what it ever gained, beyond its noise; with the step where that began."""
    collapse = find_collapse(run.series("reward/mean"))
    if collapse is None:
        return None
    return (
        f"the reward fell from {collapse.peak:.3f} to {collapse.end:.3f} and stayed there; the fall began at step "
        f"{collapse.began}"
    )


def groups_without_variance(run: RunRecord) -> str | None:
    """In the last quarter of the steps most groups have one reward for all responses: no advantage, no gradient (eq. 7)."""
    share = run.series("groups/zero_variance_fraction")
    if len(share) == 0 or (late := float(share.end(0.25).mean())) <= ZERO_VARIANCE_LIMIT:
        return None
    reward = run.series("reward/mean")
    side = "hard" if len(reward) and reward.end(0.25).mean() < reward.values.max() / 2 else "easy"
    return (
        f"{late:.0%} of the groups in the last quarter of the steps have equal rewards and teach nothing; the problems may "
        f"be too {side}, or responses_per_prompt too small"
    )


def values_not_finite(run: RunRecord) -> str | None:
    """A metric was NaN or infinite, or updates were skipped for it."""
    skipped = run.series("updates/num_skipped")
    parts = [f"{name} at {_steps(np.array(steps))}" for name, steps in run.not_finite.items()]
    if len(skipped) and skipped.values.max() > 0:
        parts.append(f"{skipped.values.max():.0f} updates were skipped")
    return f"not finite: {'; '.join(parts)}" if parts else None


CHECKS = (
    Check("The reward collapsed", "it lost half of what it had gained, beyond three times its noise", reward_collapses),
    Check(
        "Routing Replay is not in force", "asked for, and a step replayed less than every token", replay_not_in_force
    ),
    Check(
        "The clip range never clips",
        "no token clipped, and the range lies three times beyond the largest ratio",
        clip_range_never_clips,
    ),
    Check(
        "The clip range is narrower than the engine mismatch",
        "old log-probs are the engine's, and at equal weights the ratio is spread wider than the clip range",
        clip_range_below_mismatch,
    ),
    Check("Values were not finite", "a NaN or infinite metric, or a skipped update", values_not_finite),
    Check("The gradient spikes", "a norm ten times the median of the 20 steps before", gradient_spikes),
    Check("The entropy collapsed", "the last tenth's median is a tenth of the first's, or less", entropy_collapses),
    Check(
        "The engine mismatch rises", "threefold from the first to the last quarter, beyond round-off", mismatch_rises
    ),
    Check(
        "The change rate is at its noise floor", "its median is no more than twice the floor's", change_at_noise_floor
    ),
    Check(
        "Most groups have no variance",
        "more than half of the last quarter's groups have one reward",
        groups_without_variance,
    ),
)


@dataclass(frozen=True)
class Collapse:
    """A reward that was had and lost."""

    began: int  # the first step of the fall
    peak: float  # best mean over `SMOOTHING_STEPS` steps
    end: float  # mean of the last `SMOOTHING_STEPS` steps


def find_collapse(reward: Series) -> Collapse | None:
    """Whether the reward ended half-way or more from its peak back to its lowest, beyond its noise from step to step.

    Both are means over five steps. The fall began at the step after the smoothed reward was last within a quarter of
    the fall from its peak.
    """
    if len(reward) < 2 * SMOOTHING_STEPS:
        return None
    smooth = trailing_mean(reward.values, SMOOTHING_STEPS)[SMOOTHING_STEPS - 1 :]
    steps = reward.steps[SMOOTHING_STEPS - 1 :]
    peak, end = float(smooth.max()), float(smooth[-1])
    fall = peak - end
    if fall <= COLLAPSE_NOISES * noise_std(reward.values) or fall < COLLAPSE_SHARE * (peak - float(smooth.min())):
        return None
    if fall == 0:
        return None
    last_high = int(np.flatnonzero(smooth >= peak - fall / 4)[-1])
    return Collapse(int(steps[min(last_high + 1, len(steps) - 1)]), peak, end)


def clip_range(recipe: Mapping[str, Any]) -> tuple[float, float] | None:
    """ε_low and ε_high of a resolved recipe."""
    objective = recipe.get("objective", {})
    low, high = objective.get("clip_low"), objective.get("clip_high")
    return None if low is None or high is None else (float(low), float(high))


def _clip_bounds(run: RunRecord) -> tuple[float, float] | None:
    """How far log ratio may go below and above 0 before it is clipped."""
    bounds = clip_range(run.recipe)
    return None if bounds is None else (-math.log1p(-bounds[0]), math.log1p(bounds[1]))


def _unit(run: RunRecord) -> str:
    """What the objective clips; one of the user's own is taken to clip tokens."""
    return "sequence" if run.field("objective.name") in SEQUENCE_OBJECTIVES else "token"


def _steps(steps: np.ndarray) -> str:
    shown = ", ".join(str(step) for step in steps[:5])
    more = f" and {len(steps) - 5:,} more" if len(steps) > 5 else ""
    return f"step{'s' if len(steps) > 1 else ''} {shown}{more}"
