"""Answering a misspelt name: the field, what was given, what is accepted, and the nearest of it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from megatron_gspo.types import UserError


def nearest_name(given: str, accepted: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" for the accepted name closest to the one given, or nothing when none is close."""
    by_lower_case = {name.lower(): name for name in accepted}
    close = difflib.get_close_matches(given.lower(), by_lower_case, n=1)
    return f" (did you mean {by_lower_case[close[0]]!r}?)" if close else ""


def refuse_unknown_name(field: str, given: str, accepted: Iterable[str], *, also: str = "") -> None:
    """Return when `given` is among `accepted`; else raise a `UserError` that names `field` (and `also` accepted forms)."""
    names = sorted(accepted)
    if given not in names:
        raise UserError(f"{field} is {given!r}{nearest_name(given, names)}; accepted: {', '.join(names)}{also}.")
