"""How stale a response is, and what is too stale to learn from."""

import numpy as np

from megatron_gspo.training.staleness import record_staleness, without_too_stale
from megatron_gspo.training.totals import Totals
from megatron_gspo.types import FinishReason, OpenGroup, Prompt, Response, VersionSpan


def response(num_tokens: int, version: int, *earlier: VersionSpan, reason: FinishReason = "abort") -> Response:
    return Response(
        "p", np.zeros(num_tokens, np.int64), np.zeros(num_tokens, np.float32), reason, version, earlier=earlier
    )


def test_a_response_is_as_stale_as_its_oldest_token():
    mixed = response(5, 6, VersionSpan(3, 0, 1), VersionSpan(5, 1, 4))
    assert mixed.token_versions.tolist() == [3, 5, 5, 5, 6]
    complete = response(2, 5, reason="stop")
    group = OpenGroup(Prompt("p", (1,), "", ""), (mixed, None, complete))
    assert without_too_stale([group], version=7, max_staleness=4) == ([group], 0)
    (kept,), num_too_stale = without_too_stale([group], version=7, max_staleness=3)
    assert kept.responses == (None, None, complete)
    assert kept.prompt is group.prompt
    assert num_too_stale == 1
    (kept,), num_too_stale = without_too_stale([group], version=7, max_staleness=1)
    assert kept.responses == (None, None, None)
    assert num_too_stale == 2


def test_staleness_is_averaged_over_tokens():
    totals = Totals()
    record_staleness(np.array([2, 1, 1, 0]), totals)
    record_staleness(np.zeros(6, np.int64), totals)
    assert totals.sums["rollout/staleness_mean"] == (4.0, 10.0)
    assert totals.maxima["rollout/staleness_max"] == 2.0
