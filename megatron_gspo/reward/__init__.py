"""Rewards: how right a response is, in [0, 1].

`scorer` scores a step's responses by the reward that the recipe names; `registry` says what names there are; `exact` and
`math` are two of them; `overlong` is what long responses lose; `process` and `worker` are the two ends of the pipe to the process that the others run in.
"""

from megatron_gspo.reward.overlong import overlong_penalties
from megatron_gspo.reward.registry import REWARDS, RewardFunction, ScoringItem, reward_import_path
from megatron_gspo.reward.scorer import RewardScorer, ScoredBatch

__all__ = [
    "REWARDS",
    "RewardFunction",
    "RewardScorer",
    "ScoredBatch",
    "ScoringItem",
    "overlong_penalties",
    "reward_import_path",
]
