"""Recipes in files of one's own: read with the line of what is wrong, and written with what every setting means."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from d2net.errors import InputError
from d2net.fields import check_field
from d2net.reading import missing, read_text
from d2net.recipes.recipe import SECTIONS, Recipe, check_keys
from d2net.recipes.yaml_text import key_lines, read_yaml

_MEANING_FROM = 34  # column


def read_recipe(path: Path) -> Recipe:
    """A recipe from a YAML file; its name is that of the file, where it does not say another.

    Raises:
        InputError: a file that cannot be read or is no such YAML, an unknown key (the nearest is named), a wrong type
            or a number out of range, naming the file and the line.
    """
    if not path.exists():
        raise InputError(f"{path}: {missing(path)}; d2net recipes NAME > {path.name} makes one")
    text = read_text(path)
    table = read_yaml(text, str(path))
    top = [f.name for f in fields(Recipe)]
    if isinstance(table, dict):
        lines = key_lines(text)
        for key, value in table.items():
            check_keys({key: value}, top, _where(path, lines, key))
            made: Any = SECTIONS.get(key)
            for name, inner in value.items() if made and isinstance(value, dict) else ():
                where = _where(path, lines, key, name)
                check_keys({name: inner}, [f.name for f in fields(made)], where)
                try:
                    check_field(made, name, inner, f"{key}.")
                except InputError as error:
                    raise InputError(f"{where}: {error}") from None
        table = {"name": path.stem, **table}
    return Recipe.from_dict(table, source=str(path))


def _where(path: Path, lines: dict[tuple[str, ...], int], *keys: object) -> str:
    line = lines.get(tuple(map(str, keys)))  # a key that is no text is written in more ways than one
    return str(path) if line is None else f"{path}: line {line}"


def in_yaml(recipe: Recipe) -> Iterator[str]:
    """The lines of a file that :func:`read_recipe` reads back: every setting with what it means and may be."""
    table = recipe.to_dict()
    yield f"# The recipe {recipe.name}. What is left out is as in the paper. Use: d2net train --recipe FILE.yaml"
    yield from _yaml("description", table["description"])
    for section, made in SECTIONS.items():
        yield f"{section}:  # {(made.__doc__ or '').partition(chr(10))[0].rstrip('.')}"
        hints = get_type_hints(made)
        for f in fields(made):
            *before, last = _yaml(f.name, table[section][f.name])
            yield from (f"  {line}" for line in before)
            choices = f" ({' or '.join(get_args(hints[f.name]))})" if get_origin(hints[f.name]) is Literal else ""
            yield f"  {last:<{_MEANING_FROM}} # {f.metadata['meaning']}{choices}"


def _yaml(key: str, value: Any) -> list[str]:
    """Lists in one line, which is as long as it must be; a text of several lines stays one."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True)
    return f"{key}: {text.removesuffix(chr(10)).removesuffix(chr(10) + '...')}".splitlines()
