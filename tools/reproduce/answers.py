"""What an answer is, and what every rule shares.

reproduced                  the rule's condition holds, with its interval
not reproduced              its opposite holds, with its interval
not testable at this size   the runs are there, and their interval allows both
not answered yet            the runs that the rule asks for have not ended
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from tools.reproduce.intervals import Estimate
from tools.reproduce.study import Replicate

#: A difference in reward below this is none: an interval that ends below it says that there is no advantage, one that ends
#: above it and holds 0 says nothing.
MARGIN = 0.03
MIN_REPLICATES = 5
MIN_COLD_STARTS = 2


class Verdict(StrEnum):
    """The four answers."""

    REPRODUCED = "reproduced"
    NOT_REPRODUCED = "not reproduced"
    NOT_TESTABLE = "not testable at this size"
    OPEN = "not answered yet"


@dataclass(frozen=True)
class Answer:
    """What a part of a claim came to."""

    verdict: Verdict
    sentence: str
    estimates: Mapping[str, Estimate] = field(default_factory=dict)  # by what they are of


def too_few(replicates: Sequence[Replicate]) -> str | None:
    """Why a rule about reward cannot be asked yet; None where it can."""
    cold_starts = {cold_start for _, cold_start in replicates}
    if len(replicates) >= MIN_REPLICATES and len(cold_starts) >= MIN_COLD_STARTS:
        return None
    return (
        f"{len(replicates)} of {MIN_REPLICATES} replicates and {len(cold_starts)} of {MIN_COLD_STARTS} cold starts that the "
        "rule asks for have run"
    )


def shown(estimate: Estimate, *, signed: bool = False, percent: bool = False) -> str:
    """A number with its bootstrap interval."""

    def text(value: float) -> str:
        if percent:
            return f"{value:.2%}" if abs(value) < 0.1 else f"{value:.0%}"
        plain = f"{value:.3f}" if abs(value) < 1 else f"{value:#.3g}".rstrip(".")
        return f"+{plain}" if signed and value > 0 else plain

    if estimate.count < 2:
        return f"{text(estimate.value)} (one replicate)"
    return f"{text(estimate.value)} [{text(estimate.low)}, {text(estimate.high)}]"
