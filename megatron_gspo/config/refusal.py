"""What is refused in a recipe, and how it is put to the user: the field, what was given, what is accepted."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NamedTuple


class Refusal(NamedTuple):
    """One thing that cannot be accepted."""

    field: str  # dotted path: "training.mini_batches"
    sentence: str  # goes on where the field's path stops: "is 3; accepted: ..."

    def __str__(self) -> str:
        return f"{self.field} {self.sentence}"


def not_accepted(field: str, given: object, accepted: str) -> Refusal:
    """The refusal of what `field` was given, for what it takes."""
    return Refusal(field, f"is {describe(given)}; accepted: {accepted}")


def describe(given: object) -> str:
    """A value as it would stand in YAML, with its kind where that is what a reader may have missed."""
    if given is None:
        return "null"
    if isinstance(given, bool):
        return "true" if given else "false"
    if isinstance(given, str):
        return f"the text {given!r}"
    if isinstance(given, dict):
        return "a mapping"
    if isinstance(given, list):
        return "a list"
    return str(given)


def nearest_name(name: str, names: Iterable[str]) -> str:
    """`; nearest name: x` for a likely misspelling, and nothing where no name is near."""
    matches = difflib.get_close_matches(name, list(names), n=1)
    return f"; nearest name: {matches[0]}" if matches else ""
