"""``d2net recipes``."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from d2net.cli.terminal import make_console, say


def recipes(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Recipe, or FILE.yaml, to show; several to compare.")
    ] = None,
) -> None:
    """List the recipes, print one as a file to change and use, or show where several differ.

    \b
    Examples:
      d2net recipes
      d2net recipes thumos14-paper
      d2net recipes generic > mine.yaml
      d2net recipes thumos14-paper thumos14-release
      d2net recipes generic mine.yaml
    """
    from d2net.recipes import differences, in_yaml, load_recipe, recipe_names

    if not names:
        table = Table("recipe", "description", box=None)
        for each in recipe_names():
            table.add_row(each, load_recipe(each).description)
        make_console().print(table)
        return
    loaded = [load_recipe(name) for name in names]
    if len(loaded) == 1:
        for line in in_yaml(loaded[0]):
            say(line)
        return
    table = Table("setting", *names, box=None)
    for key, values in differences(loaded):
        table.add_row(key, *(_yaml_value(value) for value in values))
    make_console().print(table if table.rows else "the recipes have the same values")


def _yaml_value(value: object) -> str:
    """As --set takes it."""
    return json.dumps(value) if not isinstance(value, str) else value
