"""A response sampled in several calls: each part stays as it was sampled."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_gspo.rollout.open_groups import filled, joined, open_slots
from megatron_gspo.types import OpenGroup, Prompt, Response, VersionSpan

NUM_PROMPT_TOKENS, LAYERS, TOP_K = 3, 2, 2


def part(rng: np.random.Generator, num_before: int, num_tokens: int, version: int) -> Response:
    """What an engine answers that went on from `num_before` tokens: routes of all tokens but the last."""
    return Response(
        "p",
        rng.integers(0, 100, num_tokens),
        rng.normal(size=num_tokens).astype(np.float32),
        "abort",
        version,
        routed_experts=rng.integers(0, 8, (NUM_PROMPT_TOKENS + num_before + num_tokens - 1, LAYERS, TOP_K)),
    )


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 1)), min_size=1, max_size=5), st.integers(0, 99))
def test_every_token_keeps_what_it_was_sampled_with(parts: list[tuple[int, int]], seed: int):
    rng, whole, version = np.random.default_rng(seed), None, 5
    token_ids, log_probs, routes, versions = [], [], [], []
    for num_tokens, newer in parts:
        version += newer
        sampled = part(rng, len(token_ids), num_tokens, version)
        whole = joined(whole, sampled, NUM_PROMPT_TOKENS)
        token_ids += sampled.token_ids.tolist()
        log_probs += sampled.log_probs.tolist()
        routes += sampled.routed_experts[len(routes) :].tolist()
        versions += [version] * num_tokens
    assert whole.token_ids.tolist() == token_ids
    assert whole.log_probs.tolist() == log_probs
    assert whole.routed_experts.tolist() == routes
    assert len(routes) == NUM_PROMPT_TOKENS + len(token_ids) - 1
    assert whole.token_versions.tolist() == versions
    neighbours = zip(whole.version_spans, whole.version_spans[1:], strict=False)
    assert all(left.end == right.start and left.version != right.version for left, right in neighbours)


def test_only_what_has_not_ended_is_sampled_and_goes_where_it_belongs():
    rng = np.random.default_rng(0)
    prompts = [Prompt("a", (1, 2, 3), "", ""), Prompt("b", (4, 5, 6), "", "")]
    ended = Response("a", np.array([7]), np.zeros(1, np.float32), "stop", 0)
    begun = part(rng, 0, 2, version=0)
    groups = [OpenGroup(prompts[0], (ended, begun)), OpenGroup.of(prompts[1], 2)]
    slots = open_slots(groups)
    assert [(slot.group, slot.response, slot.num_tokens) for slot in slots] == [(0, 1, 2), (1, 0, 0), (1, 1, 0)]
    assert slots[0].token_ids == (1, 2, 3, *begun.token_ids)
    now = part(rng, 2, 1, version=0)
    after = filled(groups, [(slots[0], joined(begun, now, 3))])
    assert after[0].responses[0] is ended
    assert after[0].responses[1].version_spans == (VersionSpan(0, 0, 3),)
    assert after[1] == groups[1]
