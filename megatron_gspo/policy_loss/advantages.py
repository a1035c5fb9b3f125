"""Group advantages (eq. 7): the rewards of one prompt's G responses in, how much better than the group each was out."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike


def group_advantages(rewards: ArrayLike, normalization: Literal["std", "none"] = "std") -> np.ndarray:
    """Centre each group's rewards and, with `"std"`, divide by the group's standard deviation.

    Args:
        rewards: [..., G] finite; the last axis is a group. Read as float32, so differences below its resolution are none.
        normalization: `"std"` is eq. 7; `"none"` only subtracts the mean (Dr. GRPO).

    Returns:
        [..., G] float32. A group of equal rewards gets exactly 0. In float64 the sum of equal float32 numbers is exact,
        and so is their mean; subtracting a rounded mean would leave ±1e-17 of values like 0.1, and dividing that by its
        own deviation would blow noise up to ±1.

    The standard deviation is the population's (divided by G): the group is all there is, and advantages then have mean
    square 1 whatever G is. The sample's (divided by G - 1) would shrink them by √((G - 1) / G), 6% at G = 8. No epsilon
    is added; only equal rewards have deviation 0, and their advantages stay 0.
    """
    assert normalization in ("std", "none"), f"normalization is 'std' or 'none', not {normalization!r}"
    rewards = np.asarray(rewards, dtype=np.float32).astype(np.float64)
    assert np.isfinite(rewards).all(), "a reward is not finite; whoever scored the response answers for that"
    advantages = rewards - rewards.mean(axis=-1, keepdims=True)
    if normalization == "std":
        deviation = np.sqrt(np.square(advantages).mean(axis=-1, keepdims=True))
        advantages = np.divide(advantages, deviation, out=np.zeros_like(advantages), where=deviation > 0)
    return advantages.astype(np.float32)
