"""Plain values in YAML: what is read of recipes and of ``--set``, and in which line of a file a key stands."""

from __future__ import annotations

import re
from typing import Any

import yaml

from d2net.errors import InputError
from d2net.words import quoted, reason

_DECIMAL = re.compile(
    r"[-+]?(?:(?:0|[1-9][0-9]*)|(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|\.inf|\.nan)", re.ASCII | re.IGNORECASE
)


class _PlainLoader(yaml.SafeLoader):
    """Plain values only. Aliases could expand without end, and tags name types that no setting has.

    Numbers are decimal: YAML 1.1 has 1:30 as 90, 010 as 8, and 0x10, 0b1 and 1_000 too. A key stands once.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if event.anchor is not None or getattr(event, "tag", None) is not None:
            raise yaml.YAMLError("anchors, aliases and tags are not taken")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{quoted(key.value)} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _decimal(loader: _PlainLoader, node: yaml.ScalarNode) -> Any:
    number = "construct_yaml_int" if node.tag.endswith(":int") else "construct_yaml_float"
    value = getattr(loader, number)(node)
    if not _DECIMAL.fullmatch(node.value):
        raise yaml.MarkedYAMLError(
            problem=f"{quoted(node.value)} is no number in decimal digits alone", problem_mark=node.start_mark
        )
    return value


for _kind in ("int", "float"):
    _PlainLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _decimal)


def read_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. Raises InputError that names ``where`` it is from and, of several lines, the line."""
    try:
        return yaml.load(text, _PlainLoader)  # noqa: S506 (it is a SafeLoader)
    # ValueError: 5,000 digits, or an impossible date; OverflowError: 1:2:3:... of a hundred parts, in base 60.
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        why = getattr(error, "problem", None) or reason(error)
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark is not None and "\n" in text else ""
        raise InputError(f"{where}: {line}not a YAML value ({why}); write a plain one") from None


def key_lines(text: str) -> dict[tuple[str, ...], int]:
    """The lines, from 1, of the keys and of the keys below them, of a YAML text that :func:`read_yaml` has read.

    Read before: there no key is a list or a mapping.
    """
    lines: dict[tuple[str, ...], int] = {}
    top = yaml.compose(text, _PlainLoader)
    for key, value in top.value if isinstance(top, yaml.MappingNode) else ():
        lines[(key.value,)] = key.start_mark.line + 1
        for inner, _ in value.value if isinstance(value, yaml.MappingNode) else ():
            lines[key.value, inner.value] = inner.start_mark.line + 1
    return lines
