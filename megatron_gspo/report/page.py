"""What a page consists of, and how it is shown: one self-contained HTML file, and its head and tables in a terminal.

In: a `Page`: facts, warnings, tables, sections of figures. Out: HTML with the plotting library inside, which asks the
network for nothing (a content security policy in the page forbids it), or plain lines.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import jinja2
from markupsafe import Markup

from megatron_gspo.report.figure import Figure
from megatron_gspo.report.warnings import RunWarning
from megatron_gspo.types import UserError


@dataclass(frozen=True)
class Fact:
    """One line of the head: a question a reader has, and the answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    explained: bool = False  # the last column explains the rows; a terminal has no room for it


@dataclass(frozen=True)
class Section:
    """Figures that belong together."""

    id: str
    title: str
    introduction: str
    figures: Sequence[Figure]
    absent: Sequence[str] = ()  # titles of figures whose metrics were not measured


@dataclass(frozen=True)
class Page:
    """A report, whole."""

    title: str
    badge: str  # one word on how the run stands
    badge_kind: str  # good, neutral or bad: its colour; the word says the same
    facts: Sequence[Fact]
    warnings: Sequence[RunWarning]
    all_clear: str  # said where there is no warning
    sections: Sequence[Section]
    tables: Sequence[Table] = ()
    checks: Sequence[tuple[str, str]] = ()  # what was looked for: title and rule
    notes: Sequence[str] = field(default_factory=tuple)


def write_page(page: Page, output: Path, option: str = "--output") -> Path:
    """Write `page` as HTML to `output`, whole or not at all, and return where it is.

    Raises:
        UserError: it cannot be written.
    """
    write_text(output, render(page), option)
    return output


def write_text(output: Path, text: str, option: str) -> None:
    """Write a file aside and move it into place, so that a reader never meets half of it.

    Raises:
        UserError: it cannot be written.
    """
    aside = output.with_name(f".{output.name}.part")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.rename(output)
    except OSError as error:
        aside.unlink(missing_ok=True) if output.parent.is_dir() else None
        raise UserError(f"{option}: {output} cannot be written ({error.strerror}); accepted: a file's name") from error


def render(page: Page) -> str:
    """The page as one HTML text."""
    specifications = {
        figure.id: {"data": figure.traces, "layout": figure.layout}
        for section in page.sections
        for figure in section.figures
    }
    # Inside a script element only `<` could end it; JSON may write it as an escape.
    figures = json.dumps(specifications, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    template = _templates().get_template("page.html")
    return template.render(page=page, figures=Markup(figures), plotly=Markup(_plotly()))


def print_page(page: Page, *, figures_at: Path) -> None:
    """The head and the tables, in the terminal."""
    from rich.console import Console
    from rich.table import Table as TextTable
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=False)
    style = {"good": "green", "bad": "bold red"}.get(page.badge_kind, "yellow")
    console.print(Text(page.title, style="bold"), Text(page.badge, style=style))
    facts = TextTable.grid(padding=(0, 2))
    for fact in page.facts:
        facts.add_row(Text(fact.question, style="dim"), Text(fact.answer))
    console.print(facts)
    for warning in page.warnings:
        console.print(Text(f"WARNING {warning.title}: ", style="bold red") + Text(warning.message, style=""))
    if not page.warnings:
        console.print(Text(page.all_clear, style="green"))
    for note in page.notes:
        console.print(Text(f"Note: {note}"))
    for table in page.tables:
        text_table = TextTable(
            title=Text(table.title), title_justify="left", caption=Text(table.note) if table.note else None
        )
        shown = len(table.columns) - table.explained
        for column in table.columns[:shown]:
            text_table.add_column(column, overflow="fold")
        for row in table.rows:
            text_table.add_row(*(Text(cell) for cell in row[:shown]))
        console.print(text_table)
    console.print(Text(f"Figures: {figures_at}"), soft_wrap=True)


@cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("megatron_gspo.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _plotly() -> str:
    """plotly.js, which a script element cannot hold where it spells the element's end."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs().replace("</script", "<\\/script")
