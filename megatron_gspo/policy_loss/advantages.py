"""Group advantages (eq. 7): the rewards of one prompt's G responses in, how much better than the group each was out.

And, for responses of several turns with rewards on the way, the advantage of each token (Â_{i,t} of eq. 14).
"""

from __future__ import annotations

from collections.abc import Sequence
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


def token_advantages(
    rewards: ArrayLike, token_rewards: Sequence[np.ndarray], normalization: Literal["std", "none"] = "std"
) -> list[np.ndarray]:
    """Advantages of tokens by reward-to-go: a token answers for the rewards from itself on, not for those before it.

        Â_{i,t} = (R_i - Σ_{u < t} r_{i,u} - mean_j R_j) / std_j R_j

    Σ_{u ≥ t} r_{i,u} in place of R_i in the policy gradient leaves its expectation as it is (causality), and so does a
    constant as baseline, here the group's mean of eq. 7. Where rewards come at the end alone, every token has its
    response's Â_i exactly; eq. 14 is then eq. 6.

    Args:
        rewards: [G] finite, R: the sum of all of a response's rewards, also of that for the whole response.
        token_rewards: of each response [tokens] finite, r: what it was given on the way, at the token that earned it.
        normalization: as for `group_advantages`.

    Returns:
        Of each response [tokens] float32. In a group of equal R, which has no scale, they are 0 under `"std"`.
    """
    advantages = group_advantages(rewards, normalization).astype(np.float64)
    deviation = float(np.asarray(rewards, dtype=np.float32).astype(np.float64).std()) if normalization == "std" else 1.0
    if not advantages.any() and normalization == "std":
        return [np.zeros(len(own), dtype=np.float32) for own in token_rewards]
    return [
        (advantage - (np.cumsum(own, dtype=np.float64) - own) / deviation).astype(np.float32)
        for advantage, own in zip(advantages, token_rewards, strict=True)
    ]
