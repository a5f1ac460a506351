"""A recipe: all settings of one experiment, made of plain values and checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from d2net.errors import InputError
from d2net.fields import check_fields
from d2net.recipes.settings import EvaluationRecipe, LocalizationRecipe, LossRecipe, ModelRecipe, TrainingRecipe
from d2net.recipes.yaml_text import read_yaml
from d2net.words import did_you_mean, quoted

LONGEST_SETTING = 2000  # characters of a setting on the command line


@dataclass(frozen=True)
class Recipe:
    """All settings of one experiment; the defaults are the paper's for THUMOS14."""

    name: str
    description: str = ""
    model: ModelRecipe = field(default_factory=ModelRecipe)
    loss: LossRecipe = field(default_factory=LossRecipe)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    localization: LocalizationRecipe = field(default_factory=LocalizationRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)

    def __post_init__(self) -> None:
        check_fields(self)

    def override(self, assignments: list[str]) -> Recipe:
        """A copy with other values.

        Args:
            assignments: ``section.key=value`` each, with the value in YAML.

        Raises:
            InputError: a malformed assignment, an unknown key (the nearest is named), a wrong type or a number out of
                range.
        """
        table = self.to_dict()
        for assignment in assignments:
            path, sign, text = assignment.partition("=")
            section, _, key = path.partition(".")
            if not sign or section not in SECTIONS or not key:
                near = "" if section in SECTIONS else did_you_mean(section, SECTIONS)
                raise InputError(
                    f"{quoted(assignment)} is not of the form section.key=value{near}; sections are "
                    f"{', '.join(SECTIONS)}"
                )
            if len(text) > LONGEST_SETTING:
                raise InputError(f"{quoted(assignment)} has more than {LONGEST_SETTING} characters; shorten it")
            table[section][key] = read_yaml(text, quoted(assignment))
        return Recipe.from_dict(table, source="--set")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as the YAML and a checkpoint's JSON hold them."""
        return {
            k: list(v)
            if isinstance(v, tuple)
            else {a: list(b) if isinstance(b, tuple) else b for a, b in v.items()}
            if isinstance(v, dict)
            else v
            for k, v in asdict(self).items()
        }

    @staticmethod
    def from_dict(table: dict[str, Any], *, source: str) -> Recipe:
        """Check and convert plain values; what is missing has its default.

        Args:
            table: Sections, and their settings.
            source: Where they are from, for messages.

        Raises:
            InputError: an unknown key (the nearest is named), a wrong type or a number out of range.
        """
        check_keys(table, [f.name for f in fields(Recipe)], source)
        values = {"name": "", **table}
        try:
            for section, made in SECTIONS.items():
                given = {} if table.get(section) is None else table[section]
                check_keys(given, [f.name for f in fields(made)], f"section {section}")
                values[section] = made(**given)
            return Recipe(**values)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None


SECTIONS: dict[str, Any] = {
    "model": ModelRecipe,
    "loss": LossRecipe,
    "training": TrainingRecipe,
    "localization": LocalizationRecipe,
    "evaluation": EvaluationRecipe,
}


def check_keys(table: object, known: list[str], source: str) -> None:
    """Raises InputError where ``table`` is no dict, or has a key that is not known: the nearest is named."""
    if not isinstance(table, dict):
        raise InputError(f"{source}: expected keys and values, found {type(table).__name__}")
    for key in table:
        if key not in known:
            near = did_you_mean(str(key), known)
            raise InputError(f"{source}: unknown key {quoted(key)}{near}; known are {', '.join(known)}")
