"""Volatility on the real model, against changes whose size is known by construction."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_gspo.config import Recipe
from megatron_gspo.routing.record import RoutingReplayError
from megatron_gspo.training.assembly import Run, assemble
from megatron_gspo.training.experience import plan_mini_batches
from megatron_gspo.training.guards import SkippedUpdates
from megatron_gspo.training.loop import learn
from megatron_gspo.training.probe import Probe
from tests.distributed.training_on_ranks import fixed_experience
from tests.unit.training.test_step import make_recipe

pytestmark = pytest.mark.usefixtures("_one_rank")

EVERY_RESPONSE = {"probe_responses": 16}


@pytest.fixture
def make_run(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def make(**sections: dict) -> Run:
        recipe = make_recipe(tmp_path / str(len(runs)), **({"routing": EVERY_RESPONSE} | sections))
        runs.append(assemble(recipe))
        return runs[-1]

    yield make
    for run in runs:
        run.close()


def shift_experts_of_last_layer(run: Run) -> None:
    """Every token's set of experts in the last MoE layer moves up by one; nothing else changes before that layer."""
    router = run.policy.models[0].decoder.layers[-1].mlp.router
    with torch.no_grad():
        router.weight.copy_(router.weight.roll(1, dims=0))


def sets_of_responses(run: Run, recipe: Recipe) -> list[list[set[int]]]:
    """Each predicting token's experts in each layer, recorded apart from what is tested: [tokens][layers]."""
    assert run.routing is not None
    found = []
    for mini_batch in plan_mini_batches(fixed_experience(recipe, 1), recipe, pad_token_id=0):
        with run.routing.taps.record(mini_batch.micro_batches) as session, torch.no_grad():
            for micro_batch in mini_batch.micro_batches:
                run.policy.models[0](micro_batch)
        for micro_batch, routes in zip(mini_batch.micro_batches, session.natural_routes, strict=True):
            rows = routes.experts[micro_batch.predicting_positions].tolist()
            found += [[set(layer) for layer in token] for token in rows]
    return found


def test_the_probe_measures_a_known_change_exactly(make_run: Callable[..., Run]):
    run = make_run()
    assert run.routing is not None
    before = sets_of_responses(run, run.recipe)
    probe = Probe(run.routing, run.policy, fixed_experience(run.recipe, 1), run.recipe)
    probe.before_updates()
    probe.after_update(0)
    shift_experts_of_last_layer(run)
    probe.after_update(1)
    metrics = probe.result().metrics

    lost = [1 - len(token[-1] & {(expert + 1) % 4 for expert in token[-1]}) / 2 for token in before]
    assert metrics["routing/change_rate_layer_1"] == 0.0
    assert metrics["routing/change_rate_layer_2"] == pytest.approx(sum(lost) / len(lost), abs=1e-12)
    assert metrics["routing/change_rate"] == pytest.approx(sum(lost) / len(lost) / 2, abs=1e-12)
    # A set of 2 of 4 experts moved by one is never itself.
    assert metrics["routing/tokens_any_change"] == 1.0
    assert metrics["routing/change_rate_after_update_1"] == 0.0
    assert metrics["routing/change_rate_after_update_2"] == metrics["routing/change_rate"]
    assert metrics["routing/noise_floor"] == metrics["routing/noise_floor_repacked"] == 0.0


def test_replaying_the_old_routes_takes_the_routing_out_of_the_ratio(make_run: Callable[..., Run]):
    run = make_run()
    assert run.routing is not None
    probe = Probe(run.routing, run.policy, fixed_experience(run.recipe, 1), run.recipe)
    probe.before_updates()
    probe.after_update(0)
    shift_experts_of_last_layer(run)
    probe.after_update(1)
    metrics = probe.result().metrics
    # The gates changed with the router, so replay leaves a rest; most of the ratio's spread was the routing.
    assert metrics["ratio/token_natural_log_std"] > 0
    assert metrics["ratio/token_replayed_log_std"] < metrics["ratio/token_natural_log_std"]
    shares = [metrics[f"ratio/token_{part}_share"] for part in ("replayed_variance", "routing_variance")]
    assert sum(shares) + metrics["ratio/token_routing_covariance_share"] == pytest.approx(1.0)


def test_measuring_changes_nothing_of_what_is_learned(make_run: Callable[..., Run]):
    weights = []
    for measure in (True, False):
        run = make_run(routing=EVERY_RESPONSE | {"measure": measure})
        learn(run, fixed_experience(run.recipe, 1), 1, SkippedUpdates(0))
        weights.append([parameter.detach().clone() for parameter in run.policy.models[0].parameters()])
    for measured, unmeasured in zip(*weights, strict=True):
        assert torch.equal(measured, unmeasured)


def test_the_updates_own_change_is_zero_while_the_policy_stands_still(make_run: Callable[..., Run]):
    run = make_run(training={"learning_rate": 1e-30})
    metrics = learn(run, fixed_experience(run.recipe, 1), 1, SkippedUpdates(0)).metrics
    assert metrics["routing/update_change_rate"] == 0.0
    assert metrics["routing/change_rate"] == 0.0
    moved = make_run(training={"learning_rate": 0.05})
    metrics = learn(moved, fixed_experience(moved.recipe, 1), 1, SkippedUpdates(0)).metrics
    assert metrics["routing/update_change_rate"] > 0.0
    assert metrics["routing/change_rate"] >= metrics["routing/update_change_rate"]


def test_under_replay_the_change_is_still_measured_on_natural_routing(make_run: Callable[..., Run]):
    metrics = {}
    for replay in ("off", "r2"):
        run = make_run(routing=EVERY_RESPONSE | {"replay": replay}, training={"learning_rate": 0.05})
        metrics[replay] = learn(run, fixed_experience(run.recipe, 1), 1, SkippedUpdates(0)).metrics
    assert metrics["r2"]["routing/replayed_token_fraction"] == 1.0
    assert metrics["off"]["routing/replayed_token_fraction"] == 0.0
    assert metrics["r2"]["routing/change_rate"] > 0.0
    # What the updates themselves show under replay is along the replayed path, and is called so.
    assert "routing/replayed_path_change_rate" in metrics["r2"]
    assert "routing/update_change_rate" not in metrics["r2"]


def test_r3_without_the_engines_routes_is_an_error_and_never_live_routing(make_run: Callable[..., Run]):
    run = make_run(routing=EVERY_RESPONSE | {"replay": "r3"})
    experience = fixed_experience(run.recipe, 1)
    (sample, *rest), *others = experience.samples
    samples = ((dataclasses.replace(sample, routed_experts=None), *rest), *others)
    with pytest.raises(RoutingReplayError, match="sample 0"):
        learn(run, dataclasses.replace(experience, samples=samples), 1, SkippedUpdates(0))


def test_a_run_without_the_probe_has_no_probe_metrics(make_run: Callable[..., Run]):
    run = make_run(routing={"probe_every": 2})
    first = learn(run, fixed_experience(run.recipe, 1), 1, SkippedUpdates(0)).metrics
    second = learn(run, fixed_experience(run.recipe, 2), 2, SkippedUpdates(0)).metrics
    assert "routing/change_rate" not in first
    assert "routing/update_change_rate" in first
    assert "routing/change_rate" in second
