"""Recipe text: YAML in and out, with the scalars of YAML 1.2 and a line number for every value.

PyYAML reads scalars by YAML 1.1, where `off` is a boolean, `1e-6` is text and `010` is eight. Here the text is only
parsed by PyYAML; what a scalar means follows YAML 1.2's core schema. Refused: a field given twice, aliases, tags.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import yaml

from megatron_gspo.types import UserError

NULL = re.compile(r"~|null|Null|NULL|")
BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
INTEGER = re.compile(r"[-+]?[0-9]+")
BASED_INTEGER = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
INFINITY_OR_NAN = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
LINE_BREAK = re.compile(r"\r\n|[\n\r\x85\u2028\u2029]")  # as PyYAML counts lines

UNTAGGED = {
    yaml.MappingNode: yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG,
    yaml.SequenceNode: yaml.resolver.BaseResolver.DEFAULT_SEQUENCE_TAG,
    yaml.ScalarNode: yaml.resolver.BaseResolver.DEFAULT_SCALAR_TAG,
}


class Node(NamedTuple):
    """A value as YAML gives it (a mapping's values and a list's items are Nodes again), and its line, from 1."""

    value: object
    line: int


class _Loader(yaml.BaseLoader):
    """Every scalar stays text, so that `plain_scalar` alone says what it means."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem=f"an alias (*{event.anchor})", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


def plain_scalar(text: str) -> bool | int | float | str | None:
    """What unquoted text means by YAML 1.2's core schema."""
    if NULL.fullmatch(text):
        return None
    if text in BOOLEANS:
        return BOOLEANS[text]
    if INTEGER.fullmatch(text):
        return int(text)
    if BASED_INTEGER.fullmatch(text):
        return int(text, base=0)
    if FLOAT.fullmatch(text):
        return float(text)
    if INFINITY_OR_NAN.fullmatch(text):
        return float(text.replace(".", "", 1))
    return text


def read_yaml(text: str, source: str) -> Node:
    """Parse one YAML document; `source` (a file's name) begins every refusal."""
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise UserError(_syntax_sentence(error, text, source)) from error
    except yaml.reader.ReaderError as error:
        raise UserError(f"{source} is not text: it holds {chr(error.character)!r}; accepted: YAML in UTF-8") from error
    if root is None:
        return Node(None, 1)
    return _value(root, source)


def _value(node: yaml.Node, source: str) -> Node:
    line = node.start_mark.line + 1
    if node.tag != UNTAGGED[type(node)]:
        raise UserError(f"{source}:{line}: tag {node.tag}; accepted: plain values without a tag")
    if isinstance(node, yaml.ScalarNode):
        return Node(plain_scalar(node.value) if node.style is None else node.value, line)
    if isinstance(node, yaml.SequenceNode):
        return Node([_value(item, source) for item in node.value], line)
    mapping: dict[str, Node] = {}
    for key, value in node.value:
        key_line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{source}:{key_line}: a list or mapping as a field's name; accepted: a name")
        if key.value in mapping:
            first = mapping[key.value].line
            raise UserError(f"{source}:{key_line}: {key.value} is given twice (first in line {first}); accepted: once")
        mapping[key.value] = Node(_value(value, source).value, key_line)
    return Node(mapping, line)


def _syntax_sentence(error: yaml.MarkedYAMLError, text: str, source: str) -> str:
    # Something left open is found at the end of the text, and a missing colon a line late: the context is the place.
    left_open = error.context is not None and re.search("simple key|quoted scalar|flow", error.context)
    mark = error.context_mark if left_open else error.problem_mark
    assert mark is not None, "PyYAML marks what it cannot parse"
    where = f"{source}:{mark.line + 1}"
    line = LINE_BREAK.split(text)[mark.line]
    if "\t" in line[: len(line) - len(line.lstrip())] or repr("\t") in (error.problem or ""):
        return f"{where}: indented with a tab; accepted: spaces"
    if (error.problem or "").startswith("an alias"):
        return f"{where}: {error.problem}; accepted: values written out, or a `base` recipe to share them"
    return (
        f"{where}: {line.strip()!r} is not YAML ({error.problem}); accepted: `field: value`, indented under its section"
    )


class _Dumper(yaml.SafeDumper):
    """Quotes text that would be read back as something else: what YAML 1.2 takes for a number, and odd white space."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    if not text.isprintable():
        return dumper.represent_scalar(UNTAGGED[yaml.ScalarNode], text, style='"')
    style = None if isinstance(plain_scalar(text), str) else "'"
    return dumper.represent_scalar(UNTAGGED[yaml.ScalarNode], text, style=style)


_Dumper.add_representer(str, _represent_text)


def write_yaml(values: Mapping[str, object]) -> str:
    """The YAML that `read_yaml` reads back to the same values, in the order given."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
