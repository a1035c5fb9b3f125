"""The page about a run: what its figures hold, and what it says in words."""

import json
import re

import numpy as np
import plotly.graph_objects as go
import pytest

from megatron_gspo.report import catalogue
from megatron_gspo.report.comparison import compare_runs, comparison_page
from megatron_gspo.report.page import render
from megatron_gspo.report.read import read_run
from megatron_gspo.report.run_report import did_it_learn, report_page, write_report
from megatron_gspo.types import UserError
from tests.run_directories import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return read_run(write_run(tmp_path_factory.mktemp("report") / "run"))


@pytest.fixture(scope="module")
def figures(run):
    return figures_of(report_page(run))


def figures_of(page):
    return {figure.id: figure for section in page.sections for figure in section.figures}


def test_every_figure_is_valid_for_plotly_and_explains_itself(run, tmp_path):
    other = read_run(write_run(tmp_path / "other", "seed=2"))
    for page in (report_page(run), comparison_page(compare_runs([run, other]))):
        for id, figure in figures_of(page).items():
            go.Figure({"data": figure.traces, "layout": figure.layout})  # refuses what is no property of plotly's
            assert all((figure.how_to_read, figure.definition)), id
            assert re.search(r"\d", figure.description), f"{id}: the text alternative says no number"


def test_lines_of_a_figure_are_told_apart_without_colour(figures):
    for id, figure in figures.items():
        lines = [trace for trace in figure.traces if trace["type"] == "scatter" and "stackgroup" not in trace]
        looks = [(trace["line"].get("dash"), trace["marker"].get("symbol")) for trace in lines]
        assert len(set(looks)) == len(looks), id
        stacked = [trace["fillpattern"]["shape"] for trace in figure.traces if "stackgroup" in trace]
        assert len(set(stacked)) == len(stacked), id


def test_definitions_of_volatility_name_the_papers_section():
    unnamed = [panel.id for panel in catalogue.VOLATILITY if "§5" not in panel.definition]
    assert unnamed == ["load", "margin_auc"]  # no notions of the paper's


def test_profiles_and_flows_are_the_counts_of_the_files(figures):
    after_all, after_one = figures["depth"].traces
    assert after_all["y"] == pytest.approx([layer / 64 for layer in range(1, 5)], rel=1e-5)
    assert after_one["y"] == [0, 0, 0, 0]
    # 2 + 4 + 6 + 8 of the 4 · 64 token-layers changed one of two experts, in the first two sixteenths
    assert figures["position"].traces[0]["y"][:3] == pytest.approx([(2 + 4 + 4 + 4) / 32, (2 + 4) / 32, 0], rel=1e-5)
    flow = figures["expert_flow"]
    assert [row[1] for row in flow.traces[0]["z"]] == pytest.approx([-2 * layer / 64 for layer in range(1, 5)])
    assert (
        "Expert 7 of layer 4 gained most, +48 of 0 tokens; expert 1 of layer 4 lost most, -48 of 384"
        in flow.description
    )
    assert figures["margin"].traces[0]["y"] == [1.0, 0.0]
    assert figures["depth"].note.startswith("Counts of 6 of 6 measured steps, 5 to 30")


def test_the_heat_map_has_a_row_a_layer_and_a_column_a_step(figures):
    (trace,) = figures["heat_map"].traces
    assert np.array(trace["z"]).shape == (4, 30)
    assert [row[0] for row in trace["z"]] == pytest.approx([0.01, 0.02, 0.03, 0.04])
    assert "highest in layer 4, 4.00%, and lowest in layer 1, 1.00%" in figures["heat_map"].description


def test_zeros_that_a_logarithmic_axis_cannot_show_are_said(tmp_path):
    path = write_run(tmp_path / "run", changes={"clip/token_fraction": lambda step: 0.0 if step < 4 else 0.1})
    note = figures_of(report_page(read_run(path)))["clip_fraction"].note
    assert note == "A logarithmic axis has no 0: not drawn are tokens at 3 steps."


def test_the_head_tells_learning_from_noise(run, tmp_path):
    assert did_it_learn(run).startswith("Yes: held-out arithmetic_chain pass@1 0.400 at first, 0.800 at step 30")
    noise = np.random.default_rng(0).normal(0.5, 0.05, 31)
    flat = write_run(tmp_path / "flat", changes={"reward/mean": lambda step: float(noise[step])})
    assert "Not to be told from noise: reward" in did_it_learn(read_run(flat))
    lost = write_run(tmp_path / "lost", changes={"reward/mean": lambda step: 0.8 if step < 15 else 0.1})
    said = did_it_learn(read_run(lost))
    assert "No, it got worse: reward 0.800 at first, 0.100" in said
    assert "had reached 0.800 and fell from step" in said


def test_what_was_not_measured_is_listed_and_not_drawn(tmp_path):
    changes = {f"routing/change_rate_layer_{layer}": None for layer in range(1, 5)}
    changes |= {"routing/change_rate": None, "routing/change_rate_after_update_1": None}
    changes |= {"routing/noise_floor": None, "routing/noise_floor_repacked": None}
    page = report_page(read_run(write_run(tmp_path / "run", changes=changes, kept_every=1000)))
    (volatility,) = [section for section in page.sections if section.id == "volatility"]
    assert {"Expert change rate", "Layers × steps, depth, position, expert flow, margins"} <= set(volatility.absent)
    assert "heat_map" not in figures_of(page)


def test_2000_steps_of_48_layers_stay_below_10_mb(tmp_path):
    run = read_run(write_run(tmp_path / "run", steps=2000, layers=48, kept_every=20))
    page = report_page(run)
    heat_map = figures_of(page)["heat_map"]
    assert np.array(heat_map.traces[0]["z"]).shape == (48, 286)
    assert heat_map.note == "Each column is the mean of 7 measured steps."
    assert figures_of(page)["depth"].note.startswith("Counts of 48 of 100 measured steps")
    assert len(render(page).encode()) < 10e6


def test_the_page_fetches_nothing_and_a_name_cannot_inject_markup(tmp_path):
    run = write_run(tmp_path / "<img src=x>")
    _, where = write_report(run)
    page = where.read_text()
    assert "<img src=x>" not in page
    assert "default-src 'none'" in page
    assert not re.search(r"<(script|img)[^>]*\ssrc=|<link", page[: page.index("<script>")])
    content = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert "reward" in json.loads(content[1])


def test_a_page_that_cannot_be_written_is_one_clear_line(run, tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "page.html", tmp_path / "nowhere" / "page.html", tmp_path):
        with pytest.raises(UserError, match=r"--output: .* cannot be written"):
            write_report(run.path, output)


def test_steps_in_which_no_token_was_compared_have_no_profile(tmp_path):
    path = write_run(tmp_path / "run")
    for file in (path / "volatility").iterdir():
        with np.load(file) as arrays:
            counts = {name: arrays[name] for name in arrays.files}
        for name in ("tokens", "load_old", "lost", "gained", "margin_tokens"):
            counts[f"change_rate/{name}"][:] = 0
        np.savez_compressed(file, **counts)
    assert not {"depth", "position", "expert_flow", "margin"} & set(figures_of(report_page(read_run(path))))


def test_a_broken_volatility_file_is_named(tmp_path):
    path = write_run(tmp_path / "run")
    (path / "volatility" / "step_5.npz").write_bytes(b"PK no zip")
    with pytest.raises(UserError, match=r"step_5\.npz is broken"):
        report_page(read_run(path))
