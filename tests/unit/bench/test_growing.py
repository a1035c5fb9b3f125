"""The formula of growth counts what the model has, and the fit finds costs that were put in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_gspo.training.assembly import build_models
from tools.bench.growing import Size, exponent, fitted, write_recipe
from tools.bench.picture import draw
from tools.bench.rows.growth import BASE, along

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
    shared = np.array(replace(BASE, ranks=2).causes()) / base
    assert shared[0] == 0.5 and 0.5 < shared[1] < 0.7
    assert [size.bytes() for size in along("tokens")] == sorted(size.bytes() for size in along("tokens"))


def test_what_leaves_a_rank_is_the_tokens_of_experts_elsewhere_and_the_gradients_of_what_all_have():
    alone, of_two, of_four = (replace(BASE, ranks=ranks).exchanged_bytes() for ranks in (1, 2, 4))
    assert alone == 0 < of_two
    more = replace(BASE, ranks=2, tokens=2 * BASE.tokens).exchanged_bytes()
    # Half of a rank's 256 tokens' 2 rows of 256 float32, there and back, forward and backward, in each of 2 layers.
    assert more - of_two == 0.5 * 256 * 2 * 256 * 4 * 4 * 2
    # A rank of four has half the tokens of one of two, of which three quarters leave it, not a half.
    tokens, gradients = more - of_two, 2 * of_two - more
    assert of_four == pytest.approx(1.5 * (tokens / 2 + gradients))


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
