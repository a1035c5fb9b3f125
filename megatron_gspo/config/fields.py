"""The recipe's fields by dotted path, and what to say of one that is unknown or of the wrong type."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from megatron_gspo.config.refusal import Refusal, nearest_name, not_accepted
from megatron_gspo.config.schema import Recipe
from megatron_gspo.config.section import Section


def _walk(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo, bool]]:
    """Dotted path and description of all that a section holds, and whether it is a section itself, which comes first."""
    for name, field in section.model_fields.items():
        subsection = field.annotation
        if isinstance(subsection, type) and issubclass(subsection, Section):
            yield f"{prefix}{name}", field, True
            yield from _walk(subsection, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field, False


SECTIONS = tuple(path for path, _, is_section in _walk(Recipe) if is_section)
"""Dotted paths of the sections, outer before inner."""
FIELDS = {path: field for path, field, is_section in _walk(Recipe) if not is_section}
"""The fields that are no sections, by dotted path."""

# Pydantic's kinds of error as what is accepted; `{...}` is filled from the error's context.
ACCEPTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "path_type": "a path",
    "literal_error": "{expected}",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
}


def unknown_field(path: str) -> Refusal:
    """What to say of a dotted path that is no field: the nearest names, else the names there are."""
    if path in SECTIONS:
        return Refusal(path, f"is a section, not a field; accepted: {', '.join(_children(path))}")
    near = _nearest_fields(path)
    if near:
        return Refusal(path, f"is not a field; nearest name: {' or '.join(near)}")
    siblings = _children(path.rpartition(".")[0]) or _children("")
    return Refusal(path, f"is not a field; accepted: {', '.join(siblings)}")


def _nearest_fields(path: str) -> list[str]:
    """The field meant by a misspelt name in its section, by a misspelt section, or by a name in the wrong section."""
    section, _, name = path.rpartition(".")
    siblings = {_last_name(sibling): sibling for sibling in _children(section)}
    misspelt = difflib.get_close_matches(name, siblings, n=1)
    if misspelt:
        return [siblings[misspelt[0]]]
    misspelt = difflib.get_close_matches(path, FIELDS, n=1, cutoff=0.8)
    if misspelt:
        return misspelt
    elsewhere = difflib.get_close_matches(name, [_last_name(field) for field in FIELDS], n=1)
    return [field for field in FIELDS if _last_name(field) in elsewhere]


def _children(section: str) -> list[str]:
    """Dotted paths of a section's own fields and sections; the recipe's for the empty path."""
    return [path for path in (*SECTIONS, *FIELDS) if path.rpartition(".")[0] == section]


def _last_name(path: str) -> str:
    return path.rpartition(".")[2]


def type_refusals(error: ValidationError) -> list[Refusal]:
    """Pydantic's findings in this project's words."""
    refusals = []
    for details in error.errors():
        path, kind = ".".join(str(name) for name in details["loc"]), details["type"]
        if kind == "default_factory_not_called":
            continue  # a default that would follow from another field, which has its own entry
        if kind == "missing":
            refusals.append(Refusal(path, f"is missing; accepted: {FIELDS[path].description}"))
            continue
        assert kind in ACCEPTED, f"no words for pydantic's {kind}"
        accepted = ACCEPTED[kind].format(**details.get("ctx", {}))
        names = re.findall(r"'([^']*)'", accepted) if kind == "literal_error" else []
        refusals.append(not_accepted(path, details["input"], accepted + nearest_name(str(details["input"]), names)))
    return refusals
