"""Both pages in a real headless Chromium: complete, quiet, of one file, and usable in either scheme and at either width.

Skipped, with the reason, where no Chromium is installed.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_gspo.cli import main
from tests.chromium import Chromium, find_chromium
from tests.run_directories import write_run

PROGRAM = find_chromium()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium on the path: the pages cannot be opened")

DRAWN = "document.body !== null && document.body.dataset.drawn > 0"
#: For each figure whether plotly drew something in it that has a size
FIGURES = """[...document.querySelectorAll(".plot")].map((plot) => {
    const marks = [...plot.querySelectorAll(".scatterlayer path, .heatmaplayer image")];
    const box = plot.getBoundingClientRect();
    return {id: plot.id, marks: marks.length, width: box.width, height: box.height, right: box.right,
      words: plot.getAttribute("aria-label"), role: plot.getAttribute("role")};
})"""

#: header, first line and number of lines of what a figure's button downloads
DOWNLOADS = {
    "ratio_spread": (["series", "step", "standard deviation"], ["token, log w", "1", "0.01"], 2 * 30),
    "heat_map": (["MoE layer", "step", "change rate"], ["1", "1", "0.01"], 4 * 30),
}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    chromium = Chromium(str(PROGRAM), tmp_path_factory.mktemp("chromium") / "profile")
    yield chromium
    chromium.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("pages")
    grpo = ["objective.name=grpo", "objective.clip_low=0.2", "objective.clip_high=0.27"]
    runs = [write_run(directory / f"gspo_{seed}", f"seed={seed}") for seed in (1, 2)]
    runs += [write_run(directory / f"grpo_{seed}", f"seed={seed}", *grpo) for seed in (1, 2)]
    found = {"report": runs[0] / "report.html", "compare": directory / "comparison.html"}
    assert main(["report", str(runs[0])]) == 0
    assert main(["compare", *map(str, runs), "--output", str(found["compare"]), "--json", "--csv"]) == 0
    assert found["compare"].with_suffix(".json").is_file()
    assert found["compare"].with_suffix(".csv").is_file()
    return found


@pytest.mark.parametrize("page", ["report", "compare"])
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
def test_every_figure_is_drawn_without_an_error_or_a_request(
    page: str, width: int, dark: bool, browser: Chromium, pages: dict[str, Path]
):
    browser.open(pages[page], width=width, dark=dark)
    browser.wait_for(DRAWN)
    figures = browser.evaluate(FIGURES)
    assert len(figures) > 20
    for figure in figures:
        assert figure["marks"] > 0, figure
        assert min(figure["width"], figure["height"]) > 200, figure
        assert figure["right"] <= width, figure
        assert figure["role"] == "img"
        assert len(figure["words"]) > 40
    assert browser.complaints() == []
    # Colour bars are images within the page.
    fetched = [address for address in browser.requests() if not address.startswith(("data:image/", "blob:"))]
    assert fetched == [pages[page].resolve().as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width


def test_the_open_page_follows_the_readers_scheme_and_gives_its_data_as_csv(
    browser: Chromium, pages: dict[str, Path], tmp_path: Path
):
    look = """(() => {
        const line = document.querySelector("#reward .scatterlayer .js-line");
        return [getComputedStyle(document.body).backgroundColor, getComputedStyle(line).stroke];
    })()"""
    browser.open(pages["report"], width=1280, dark=False)
    browser.wait_for(DRAWN)
    assert browser.evaluate(look) == ["rgb(255, 255, 255)", "rgb(0, 114, 178)"]
    scheme = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.send("Emulation.setEmulatedMedia", media="screen", features=scheme)
    browser.wait_for(f"{look}[1] !== 'rgb(0, 114, 178)'")
    assert browser.evaluate(look) == ["rgb(20, 23, 26)", "rgb(86, 180, 233)"]

    browser.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path), eventsEnabled=True)
    for figure, (header, first, num_rows) in DOWNLOADS.items():
        browser.events.clear()
        browser.evaluate(f"document.querySelector('button[data-figure={figure}]').click()")
        while not any(
            event["params"]["state"] == "completed" for event in browser.events_of("Browser.downloadProgress")
        ):
            browser.evaluate("1")
        with (tmp_path / f"{figure}.csv").open() as file:
            rows = list(csv.reader(file))
        assert (rows[0], rows[1], len(rows) - 1) == (header, first, num_rows)
