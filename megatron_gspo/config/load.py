"""From a recipe file and `section.field=value` overrides to a checked `Recipe`, and back to YAML.

A recipe is read as layers (its `base`, the file itself, the command line), each a flat table of dotted path to value
and place, so that a later layer replaces an earlier one's fields one by one and every refusal names the place the value
came from. The table then goes through the strict types of `schema.py` and the rules of `check.py` and `model_fit.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from megatron_gspo.config.check import check_recipe, names_a_file, names_a_task
from megatron_gspo.config.fields import FIELDS, SECTIONS, type_refusals, unknown_field
from megatron_gspo.config.model_fit import check_model
from megatron_gspo.config.refusal import Refusal, nearest_name, not_accepted
from megatron_gspo.config.schema import Recipe
from megatron_gspo.config.yaml_text import Node, plain_scalar, read_yaml, write_yaml
from megatron_gspo.types import UserError

COMMAND_LINE = "command line"
PATH_FIELDS = ("model.path", "rollout.sglang.key_file", "rollout.sglang.python", "rollout.sglang.weights_dir")


class Given(NamedTuple):
    """A field's value and the place it was given in."""

    value: object
    where: str  # "recipes/tiny_gspo.yaml:12" or "command line"


Layer = dict[str, Given]  # by dotted path: "training.steps"


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, with `section.field=value` overrides on top.

    Relative paths are relative to the file that names them, on the command line to the current directory; in the
    recipe returned they are absolute. Data files need not be there yet (see `require_data_files`). Of two overrides of a
    field the later holds.

    Raises:
        UserError: a line for each thing refused: the place, the field, what was given, what is accepted.
    """
    given = _read_file(path) | _read_overrides(overrides)
    unknown = [unknown_field(field) for field in given if field not in FIELDS]
    if unknown:
        raise _user_error(path, given, unknown)
    try:
        recipe = Recipe.model_validate(_nested(given))
    except ValidationError as error:
        raise _user_error(path, given, type_refusals(error)) from error
    refusals = check_recipe(recipe) + check_model(recipe)
    if refusals:
        raise _user_error(path, given, refusals)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The fully resolved recipe as YAML; `load_recipe` reads it back to an equal recipe."""
    return write_yaml(recipe.model_dump(mode="json"))


def _user_error(path: Path, given: Layer, refusals: Sequence[Refusal]) -> UserError:
    """The refusals, one line each, after the place its field was given in; a field not given is the file's."""
    lines = []
    for refusal in refusals:
        where = given[refusal.field].where if refusal.field in given else str(path)
        lines.append(f"{where}: {refusal}")
    return UserError("\n".join(lines))


def _read_file(path: Path, opened_by: tuple[Path, ...] = (), named_by: str = "") -> Layer:
    """The fields of a recipe file, on top of those of the recipe it is based on. `named_by` begins refusals of the file."""
    text = _read_text(path, named_by)
    if path.resolve() in (opened.resolve() for opened in opened_by):
        chain = " → ".join(opened.name for opened in (*opened_by, path))
        raise UserError(f"{named_by}{path} is based on this recipe ({chain}); accepted: a recipe that is not")
    fields = read_yaml(text, str(path)).value
    if not isinstance(fields, dict):
        what = "is empty" if fields is None else "is not a mapping"
        raise UserError(f"{path} {what}; accepted: a mapping of {', '.join(Recipe.model_fields)}")
    base = fields.pop("base", None)
    layer = {} if base is None else _read_base(base, (*opened_by, path))
    return layer | _with_absolute_paths(dict(_flat(fields, "", str(path))), path.parent)


def _read_base(base: Node, opened_by: tuple[Path, ...]) -> Layer:
    """The fields of the recipe that the last of `opened_by` is based on."""
    where, directory = f"{opened_by[-1]}:{base.line}", opened_by[-1].parent
    if not isinstance(base.value, str):
        raise UserError(f"{where}: {not_accepted('base', base.value, 'a recipe file, relative to this one')}")
    return _read_file(directory / base.value, opened_by, named_by=f"{where}: base ")


def _read_text(path: Path, named_by: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        near = nearest_name(path.name, sorted(other.name for other in path.parent.glob("*.yaml")))
        raise UserError(f"{named_by}{path} does not exist; accepted: a recipe file{near}") from error
    except IsADirectoryError as error:
        raise UserError(f"{named_by}{path} is a directory; accepted: a recipe file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{named_by}{path} cannot be read ({error}); accepted: YAML in UTF-8") from error


def _flat(fields: Mapping[str, Node], prefix: str, source: str) -> Iterator[tuple[str, Given]]:
    """Every field with its dotted path. A section left empty gives none; what is no section's mapping stays as it is."""
    for name, (value, line) in fields.items():
        path = f"{prefix}{name}"
        if "." in name:
            raise UserError(f"{source}:{line}: {path} has a dot; accepted: fields indented under their section's name")
        if path in SECTIONS and isinstance(value, dict):
            yield from _flat(value, f"{path}.", source)
        elif path not in SECTIONS or value is not None:
            yield path, Given(value, f"{source}:{line}")


def _read_overrides(overrides: Sequence[str]) -> Layer:
    layer: Layer = {}
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"{COMMAND_LINE}: {override!r} has no `=`; accepted: section.field=value")
        text = text.strip()
        # Quotes mean what they mean in YAML. Any other text is taken whole: a path may hold what YAML gives a meaning.
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        value = read_yaml(text, f"{COMMAND_LINE}: {path}").value if quoted else plain_scalar(text)
        layer[path.strip()] = Given(value, COMMAND_LINE)
    return _with_absolute_paths(layer, Path.cwd())


def _with_absolute_paths(layer: Layer, directory: Path) -> Layer:
    """The layer with its paths made absolute; a name in a data field stays, being a task's or a mistake."""
    resolved = dict(layer)
    for field in (*PATH_FIELDS, "data.train", "data.eval"):
        value, where = layer.get(field, (None, ""))
        if not isinstance(value, str):
            continue
        if field in PATH_FIELDS or (names_a_file(value) and not names_a_task(value)):
            path = directory / (Path(value).expanduser() if value.startswith("~/") else Path(value))
            # The python of a virtual environment is a link to the one it was made from, and is told apart by its place.
            absolute = path.absolute() if field == "rollout.sglang.python" else path.resolve()
            resolved[field] = Given(str(absolute), where)
    return resolved


def _nested(given: Layer) -> dict[str, Any]:
    """The table as the nested mappings pydantic reads. Every section is there, so that what is missing is a field."""
    nested: dict[str, Any] = {}
    for section in SECTIONS:
        _descend(nested, section)
    for path, (value, _) in given.items():
        section, _, name = path.rpartition(".")
        _descend(nested, section)[name] = value
    return nested


def _descend(nested: dict[str, Any], section: str) -> dict[str, Any]:
    for name in section.split(".") if section else ():
        nested = nested.setdefault(name, {})
    return nested


def read_step_count(path: Path) -> int:
    """`training.steps` of a resolved recipe, without checking the rest of it: its model need not be there any more."""
    steps = _read_file(path)["training.steps"].value
    assert isinstance(steps, int), "a recipe that was checked when it was written"
    return steps
