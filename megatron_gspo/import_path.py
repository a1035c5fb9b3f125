"""`package.module:attribute`: how a recipe names code of one's own (a task, a reward, an objective)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module

from megatron_gspo.names import nearest_name
from megatron_gspo.types import UserError

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_import_path(name: str) -> bool:
    """Whether `name` has the form `package.module:attribute`."""
    return _IMPORT_PATH.fullmatch(name) is not None


def find_import_path(field: str, name: str, known: Mapping[str, str], own: str, also: tuple[str, ...] = ()) -> str:
    """The import path that `name` stands for: what is `known` by that name, or `name` itself where it has the form of one.

    Args:
        field: the recipe's field that has `name`.
        name: what it has.
        known: name -> import path.
        own: what the import path of one's own names, for the message.
        also: names that the field accepts and that stand for no import path.

    Raises:
        UserError: it is neither.
    """
    if name in known:
        return known[name]
    if is_import_path(name):
        return name
    names = [*also, *known]
    raise UserError(f"{field} is {name!r}{nearest_name(name, names)}; accepted: {', '.join(names)}, or {own}")


def import_attribute(import_path: str) -> object:
    """The attribute that `package.module:attribute` names.

    Raises:
        UserError: the module cannot be found or imported, or has no such attribute.
    """
    module_name, _, attribute = import_path.partition(":")
    try:
        module = import_module(module_name)
    except Exception as error:  # it is the user's module: it may fail in any way
        raise UserError(f"{import_path!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        raise UserError(f"{import_path!r}: module {module_name!r} has no attribute {attribute!r}")
    return getattr(module, attribute)
