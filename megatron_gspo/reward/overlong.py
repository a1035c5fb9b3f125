"""Soft overlong punishment (DAPO, arXiv 2503.14476, eq. 13): what a response near the length limit loses of its reward.

In: lengths of responses. Out: a penalty each, which is added to the reward before advantages are taken.

    0                          |y| <= L_max - L_cache
    ((L_max - L_cache) - |y|) / L_cache      between
    -1                         |y| >= L_max

L_max is `rollout.max_response_tokens` and L_cache `reward.overlong_buffer_tokens`. Lengths count the stop token.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def overlong_penalties(lengths: ArrayLike, *, max_tokens: int, buffer_tokens: int) -> np.ndarray:
    """Penalties [...] float32, from 0 to -1, of responses of `lengths` [...] tokens.

    Args:
        lengths: at most `max_tokens`.
        max_tokens: where sampling ends.
        buffer_tokens: over how many of the last tokens the penalty rises; above 0.
    """
    assert buffer_tokens > 0, "without a buffer there is no penalty to ask for"
    beyond = np.asarray(lengths) - (max_tokens - buffer_tokens)
    return (-np.clip(beyond / buffer_tokens, 0.0, 1.0)).astype(np.float32)
