"""The formula of growth counts what the model has, and the fit finds costs that were put in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_gspo.training.assembly import build_models
from tools.bench.growing import Size, exponent, fitted, grown_bytes, held_bytes, load_of_the_fullest, write_recipe
from tools.bench.picture import draw
from tools.bench.rows.growth import BASE, along, formula_of_ranks

SMALL = Size(tokens=256, experts=4, layers=1)


@pytest.mark.usefixtures("_one_rank")
def test_parameters_of_the_formula_are_the_models_but_for_its_norms(tmp_path: Path):
    (model,) = build_models(write_recipe(SMALL, tmp_path))
    matrices = sum(weight.numel() for weight in model.parameters() if weight.ndim > 1)
    assert SMALL.causes()[1] == matrices


def test_a_size_costs_what_grows_with_it():
    base = np.array(BASE.causes())
    assert replace(BASE, tokens=2 * BASE.tokens).causes() == pytest.approx(base * [2, 1, 1, 1])
    deeper = np.array(replace(BASE, layers=2 * BASE.layers).causes()) / base
    assert deeper[2] == 2 and 1.8 < deeper[0] < 2 and 1.8 < deeper[1] < 2
    wider = np.array(replace(BASE, experts=2 * BASE.experts).causes()) / base
    assert 1 < wider[0] < 1.01 and 1.7 < wider[1] < 2
    assert np.array(replace(BASE, ranks=2).causes()) == pytest.approx(base * [0.5, 0.5, 1, 1])


@pytest.mark.parametrize("size", [*along("experts"), *along("ranks")], ids=str)
def test_bytes_at_the_peak_are_those_of_the_formula_in_the_docs(size: Size):
    of, experts = size.shapes, size.expert_parameters
    held = 16 * experts + 8 * size.shared_parameters * (1 + 1 / size.ranks)
    assert size.held_bytes() == pytest.approx(held, rel=0.01)  # norms, and room between parameters
    # A token's, in a layer: both norms and layers' inputs; attention; routes; rows and what their experts make of them.
    heads = (2 * of.query + of.key_value) / of.head
    attention = 20 * of.query + 16 * of.key_value + 4 * heads + 16
    kept = 16 * of.hidden + 8 + attention + 5 * of.experts + of.top_k * (4 * of.hidden + 20 * of.expert_width + 24)
    passing = of.top_k * (8 * of.hidden + 16 * of.expert_width)
    weights = 8 * of.experts / size.ranks * of.hidden * of.expert_width
    backward = size.tokens / size.ranks * (size.layers * kept + passing) + weights
    copied = 4 * size.shared_parameters if size.ranks > 1 else 0
    assert size.bytes() - size.held_bytes() == pytest.approx(max(backward, copied))


@pytest.mark.usefixtures("_one_rank")
def test_the_fullest_rank_has_the_rows_of_its_experts():
    size = Size(experts=4, ranks=2)
    routes = [torch.tensor([[[0], [0], [3]], [[1], [2], [0]]], dtype=torch.uint8)]  # three tokens in each of two layers
    assert load_of_the_fullest(routes, size) == pytest.approx(4 / 3)
    of = size.shapes
    even = size.tokens // 2 * of.top_k
    rows = round(4 / 3 * even) - even  # beyond an even share
    kept, passing = size.layers * (4 * of.hidden + 20 * of.expert_width + 4), 8 * of.hidden + 16 * of.expert_width
    assert size.bytes(4 / 3) - size.bytes() == pytest.approx(rows * (kept + passing))


@pytest.mark.usefixtures("_one_rank")
def test_bytes_held_are_the_models_tensors_each_memory_once(tmp_path: Path):
    before = held_bytes()
    (model,) = build_models(write_recipe(SMALL, tmp_path))
    shared = [weight.view(-1) for weight in model.parameters()]
    weights = sum(weight.nbytes for weight in shared)
    assert weights <= held_bytes() - before < 1.01 * weights


def test_bytes_grown_are_those_of_the_moment_with_most():
    def run() -> torch.Tensor:
        first = torch.zeros(3, 2**20)
        del first
        second = torch.zeros(2, 2**20)
        return second.sum()

    assert 3 * 2**22 <= grown_bytes(run) < 3 * 2**22 + 2**12


def test_among_ranks_the_formula_finds_what_a_peer_costs_and_how_much_slower_all_is():
    costs = np.array([2e-11, 1e-9, 0.0, 0.01])
    sizes = along("ranks")
    seconds = {size: 1.5 * float(np.dot(size.causes(), costs)) + 0.02 * (size.ranks - 1) for size in sizes}
    assert formula_of_ranks(costs, seconds) == pytest.approx(seconds)
    without_peers = {size: 1.5 * float(np.dot(size.causes(), costs)) for size in sizes}
    assert formula_of_ranks(costs, without_peers) == pytest.approx(without_peers)


def test_the_fit_finds_the_costs_and_none_is_negative():
    rng = np.random.default_rng(0)
    causes = rng.uniform(1, 10, (12, 3)) * [1e9, 1e6, 1]
    costs = np.array([2e-11, 0.0, 0.5])
    assert fitted(causes, causes @ costs) == pytest.approx(costs, abs=1e-16)
    assert (fitted(causes, 1 / causes[:, 0]) >= 0).all()


def test_the_exponent_of_a_power_law_is_its_own():
    assert exponent([1, 2, 4, 8], [3 * factor**0.7 for factor in (1, 2, 4, 8)]) == pytest.approx(0.7)


def test_the_picture_is_drawn_from_results_alone(tmp_path: Path):
    values = {"factors": [1, 2], "time": [[1, 1.9], [1, 2.1]], "time by formula": [1, 2]}
    values |= {"memory": [1, 1.5], "memory by formula": [1, 1.4]}
    draw({"tokens": values, "ranks": values}, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
