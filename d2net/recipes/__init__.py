"""Recipes: every number of an experiment, by name.

A recipe is a YAML file, beside this module or of your own, that only sets values; what the values mean, and the paper's
value as default, is said once, in :mod:`d2net.recipes.settings`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from d2net.errors import InputError
from d2net.fields import Count, Fraction, Weight
from d2net.recipes.files import in_yaml, read_recipe
from d2net.recipes.recipe import LONGEST_SETTING, SECTIONS, Recipe
from d2net.recipes.settings import (
    BelowOne,
    Eps,
    EvaluationRecipe,
    LocalizationRecipe,
    LossRecipe,
    ModelRecipe,
    TrainingRecipe,
    Width,
)
from d2net.recipes.yaml_text import read_yaml
from d2net.words import did_you_mean, quoted

__all__ = [
    "LONGEST_SETTING",
    "BelowOne",
    "Count",
    "EvaluationRecipe",
    "Eps",
    "LocalizationRecipe",
    "LossRecipe",
    "ModelRecipe",
    "Recipe",
    "Fraction",
    "TrainingRecipe",
    "Weight",
    "Width",
    "differences",
    "in_yaml",
    "load_recipe",
    "recipe_names",
]
FILES = (".yaml", ".yml")  # how the names of recipes in files end


def recipe_names() -> list[str]:
    """Names of the recipes that ship with d2net."""
    return sorted(p.name[:-5] for p in resources.files(__package__).iterdir() if p.name.endswith(".yaml"))


def load_recipe(name: str) -> Recipe:
    """Load a recipe by name, or from a file whose name ends in ``.yaml``.

    Raises:
        InputError: no such recipe, and then the message lists what there is; a file that is none, naming the line.
    """
    if name.lower().endswith(FILES):
        return read_recipe(Path(name))
    names = recipe_names()
    if name not in names:
        raise InputError(
            f"unknown recipe {quoted(name)}{did_you_mean(name, names)}; there are {', '.join(names)}, or give a file "
            "of your own, FILE.yaml"
        )
    text = (resources.files(__package__) / f"{name}.yaml").read_text(encoding="utf-8")
    return Recipe.from_dict({"name": name, **read_yaml(text, f"recipe {name}")}, source=f"recipe {name}")


def differences(recipes: Sequence[Recipe]) -> list[tuple[str, list[object]]]:
    """Every setting in which the recipes differ: ``section.key``, and the value of each recipe."""
    tables = [recipe.to_dict() for recipe in recipes]
    rows = []
    for section in SECTIONS:
        for key in tables[0][section]:
            values = [table[section][key] for table in tables]
            if any(value != values[0] for value in values):
                rows.append((f"{section}.{key}", values))
    return rows
