"""What the paper claims, part by part, and the rule by which each is answered. Written down before the results.

In: `measure.Results`. Out: an answer a part (`answers.py`). Every interval is over replicates (seed × cold start), and
`intervals.py` says how. Parts that the paper does not claim are controls: they ask why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tools.reproduce.answers import MARGIN, Answer, Verdict
from tools.reproduce.measure import Results
from tools.reproduce.reward_rules import (
    collapses_later,
    end_reward,
    engine_costs_grpo_more,
    engine_suffices_for_gspo,
    is_ahead,
    is_not_behind,
    mean_reward,
)
from tools.reproduce.routing_rules import (
    clips_more,
    clips_more_whatever_the_range,
    more_change_in_deeper_models,
    more_change_where_fewer_are_activated,
    routing_hardly_moves_longer_sequences,
    routing_hardly_moves_sequences,
    routing_moves_token_ratios,
    ten_percent_change,
)
from tools.reproduce.study import COMMON_RATE


@dataclass(frozen=True)
class Claim:
    """A part of one of the paper's claims."""

    id: str
    text: str
    source: str
    rule: str
    experiments: tuple[str, ...]  # what it is answered from
    decide: Callable[[Results], Answer]

    def answer(self, results: Results) -> Answer:
        """What the results say."""
        absent = [name for name in self.experiments if name not in results.experiments]
        if absent:
            return Answer(Verdict.OPEN, "the full form of the study asks this")
        answer = self.decide(results)
        if answer.verdict == Verdict.NOT_TESTABLE and not all(results.is_whole(name) for name in self.experiments):
            return replace(answer, verdict=Verdict.OPEN, sentence=f"undecided so far: {answer.sentence}")
        return answer


_AHEAD = f"not reproduced: the interval lies below +{MARGIN}; else reproduced: it lies above 0; else not testable"
_NOT_BEHIND = f"reproduced: the interval lies above −{MARGIN}; else not reproduced: it lies below 0; else not testable"

CLAIMS = (
    Claim(
        "1a",
        "GSPO is more efficient than GRPO, each at its best learning rate",
        "Figure 1, §5.1",
        f"mean reward over all steps, GSPO − GRPO, rates chosen on seeds of their own. {_AHEAD}",
        ("best", "sweep"),
        is_ahead("best", "gspo", "grpo", mean_reward),
    ),
    Claim(
        "1b",
        f"GSPO is more efficient than GRPO at a common learning rate ({COMMON_RATE:g})",
        "Figure 1, §5.1",
        f"mean reward over all steps, GSPO − GRPO. {_AHEAD}",
        ("common",),
        is_ahead("common", "gspo", "grpo", mean_reward),
    ),
    Claim(
        "1c",
        "GSPO stays stable at higher learning rates than GRPO",
        "Figure 1, §5.1",
        "lowest rate of the sweep at which a run collapses (ends below where it started). reproduced: GSPO's is higher from "
        "every cold start; not reproduced: from none; else not testable",
        ("sweep",),
        collapses_later(("sweep", "gspo"), ("sweep", "grpo")),
    ),
    Claim(
        "1d",
        "GSPO stays stable where responses are far off-policy (16 updates a step)",
        "§4.2, §5.1",
        f"end reward, GSPO − GRPO. {_AHEAD}",
        ("off_policy",),
        is_ahead("off_policy", "gspo", "grpo", end_reward),
    ),
    Claim(
        "1e",
        "It is the sequence-level ratio that helps, not a smaller trust region (16 updates a step)",
        "control",
        f"end reward, GSPO − GRPO with a clip range as tight. {_AHEAD}",
        ("off_policy",),
        is_ahead("off_policy", "gspo", "grpo_tight", end_reward),
    ),
    Claim(
        "2a",
        "GSPO clips about two orders of magnitude more tokens than GRPO",
        "Figure 2, §5.2",
        "clip fraction, GSPO over GRPO, each at its range. reproduced: the interval lies within 30 to 300; not reproduced: "
        "outside; else not testable",
        ("common",),
        clips_more,
    ),
    Claim(
        "2b",
        "Adjusting the clip ranges does not alter that",
        "§5.2",
        "the same with GRPO's range as tight as GSPO's, and GSPO's as wide as GRPO's. reproduced: both within 30 to 300; not "
        "reproduced: one outside; else not testable",
        ("common", "clip"),
        clips_more_whatever_the_range,
    ),
    Claim(
        "3a",
        "GRPO needs Routing Replay on a MoE, each at its best learning rate",
        "Figure 3, §5.3",
        f"end reward, GRPO + R2 − GRPO. {_AHEAD}",
        ("best", "sweep"),
        is_ahead("best", "grpo_r2", "grpo", end_reward),
    ),
    Claim(
        "3b",
        f"GRPO needs Routing Replay on a MoE, at a common learning rate ({COMMON_RATE:g})",
        "Figure 3, §5.3",
        f"end reward, GRPO + R2 − GRPO. {_AHEAD}",
        ("common",),
        is_ahead("common", "grpo_r2", "grpo", end_reward),
    ),
    Claim(
        "3c",
        "GRPO needs Routing Replay where responses are far off-policy (16 updates a step)",
        "Figure 3, §5.3",
        f"end reward, GRPO + R2 − GRPO. {_AHEAD}",
        ("off_policy",),
        is_ahead("off_policy", "grpo_r2", "grpo", end_reward),
    ),
    Claim(
        "3d",
        "GSPO does not need Routing Replay",
        "§5.3",
        f"end reward at the common rate, GSPO − (GSPO + R2). {_NOT_BEHIND}",
        ("common",),
        is_not_behind("common", "gspo", "gspo_r2", end_reward),
    ),
    Claim(
        "3e",
        "It is the routing: GRPO on a dense model of equal size stays stable at higher learning rates",
        "control",
        "lowest rate of the sweep at which GRPO collapses. reproduced: the dense model's is higher from every cold start; not "
        "reproduced: from none; else not testable",
        ("dense", "sweep"),
        collapses_later(("dense", "grpo"), ("sweep", "grpo")),
    ),
    Claim(
        "3f",
        "GRPO needs R3 where the engine routes tokens otherwise (bfloat16)",
        "control",
        f"end reward with a bfloat16 engine, GRPO + R3 − GRPO. {_AHEAD}",
        ("engine",),
        is_ahead("engine", "grpo_bf16_r3", "grpo_bf16", end_reward),
    ),
    Claim(
        "4a",
        "About 10% of the activated experts change after one update",
        "§5.3",
        "mean change rate after the first update of a step, GRPO at the common rate, deepest model. reproduced: the interval "
        "lies within 5% to 20%; not reproduced: outside; else not testable. At least four replicates",
        ("common", "depth"),
        ten_percent_change,
    ),
    Claim(
        "4b",
        "More change in deeper models (2, 4, 8, 16 layers)",
        "§5.3",
        "slope of log₂ of that rate over log₂ of the depth, replicates that every depth has. reproduced: the interval lies "
        "above 0; not reproduced: below; else not testable. At least four replicates",
        ("common", "depth"),
        more_change_in_deeper_models,
    ),
    Claim(
        "4c",
        "More change in sparser models (2 of 64 experts against 2 of 16)",
        "where effects begin",
        "mean change rate after the first update of a step, 64 experts over 16, equal seeds. reproduced: the interval lies "
        "above 1; not reproduced: below; else not testable. At least four replicates",
        ("common", "sparse"),
        more_change_where_fewer_are_activated,
    ),
    Claim(
        "5a",
        "Routing change makes token ratios fluctuate",
        "§5.3",
        "routing's share of the variance of log w (old routes replayed against natural), GRPO at the common rate. reproduced: "
        "the interval lies above 10%; not reproduced: below; else not testable",
        ("common",),
        routing_moves_token_ratios,
    ),
    Claim(
        "5b",
        "and hardly moves sequence likelihoods",
        "§5.3",
        "routing's share of the variance of log s over its share of that of log w; averaging independent tokens leaves it at "
        "1. reproduced: the interval lies below 0.5; not reproduced: above; else not testable",
        ("common",),
        routing_hardly_moves_sequences,
    ),
    Claim(
        "5c",
        "and hardly moves those of responses nearly twice as long (chains of 8 operations)",
        "where effects begin",
        "as 5b. At least four replicates",
        ("long",),
        routing_hardly_moves_longer_sequences,
    ),
    Claim(
        "6a",
        "The engine's likelihoods suffice for GSPO",
        "§5.4",
        f"mean reward over all steps with a bfloat16 engine, its likelihoods − the trainer's. {_NOT_BEHIND}",
        ("engine",),
        engine_suffices_for_gspo,
    ),
    Claim(
        "6b",
        "and cost GRPO more",
        "§5.4",
        f"what they change for GSPO − what they change for GRPO. {_AHEAD}",
        ("engine",),
        engine_costs_grpo_more,
    ),
    Claim(
        "6c",
        "They suffice for GSPO where the clip range is wider than the mismatch",
        "control",
        f"mean reward over all steps, GSPO with the engine's likelihoods and a range of 0.03 − with the trainer's. {_NOT_BEHIND}",
        ("engine",),
        is_not_behind("engine", "gspo_engine_wide", "gspo_bf16", mean_reward),
    ),
)
