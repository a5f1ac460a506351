"""Recipes: every number of an experiment, by name.

A recipe is a YAML file beside this module that only sets values; what the values mean, and the paper's value
as default, is said once, in the dataclasses below.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from typing import Any

import yaml

from d2net.errors import InputError


@dataclass(frozen=True)
class ModelRecipe:
    """The network (Fig. 2)."""

    embedding_dim: int | None = None  # width of x(t); None: the width of a stream
    kernel_size: int = 3  # of every temporal convolution; (3, 1) on THUMOS14, (5, 2) on ActivityNet1.2
    dilation: int = 1
    residual: bool = False  # add a layer's input to its output (the released code does)
    dropout: float = 0.0  # before the classifier


@dataclass(frozen=True)
class LossRecipe:
    """Eq. 1 to 11."""

    alpha_snippet: float = 0.2  # weight of L_DS; the paper's alpha (Eq. 1) for both terms
    alpha_video: float = 0.2  # weight of L_DV
    beta: float = 2.0  # focusing parameter (Eq. 4)
    gamma: float = 0.01  # intra-class compactness (Eq. 3)
    threshold: float = 0.5  # tau on the foreground attention (Eq. 2)
    background_threshold: float = 0.5  # tau on the background attention (Eq. 2)
    topk_divisor: int = 8  # p is the mean of the ceil(s / 8) largest activations
    momentum: float = 0.9  # of the running background reference x_ref (Eq. 8)


@dataclass(frozen=True)
class TrainingRecipe:
    """Sec. 4, implementation details."""

    iterations: int = 20_000
    batch_size: int = 10
    learning_rate: float = 1e-4
    weight_decay: float = 0.005
    max_snippets: int = 750  # longer recordings are cropped at random to this many snippets


@dataclass(frozen=True)
class LocalizationRecipe:
    """Sec. 3.3."""

    topk_divisor: int = 8
    class_threshold: float = 0.5  # a class is kept when p > class_threshold * max(p)
    thresholds: tuple[float, ...] = tuple(round(0.025 * i, 3) for i in range(1, 21))
    min_length: int = 1  # snippets
    inflation: float = 0.25  # width of each outer neighbourhood, as a share of the proposal's
    nms_iou: float = 0.5
    score_floor: float = 0.1  # S_th as a share of the recording's best score
    attention: bool = True  # refine the TCAM with the bottom-up attention (r_c = lambda' T_c)


@dataclass(frozen=True)
class EvaluationRecipe:
    """What is reported."""

    protocol: str = "activitynet"  # or "wtalc"
    tiou: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


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

    def override(self, assignments: list[str]) -> Recipe:
        """A copy with values replaced, each given as ``section.key=value`` (value in YAML).

        Raises:
            InputError: a malformed assignment, an unknown key (the nearest is named) or a wrong type.
        """
        table = self.to_dict()
        for assignment in assignments:
            path, sign, text = assignment.partition("=")
            section, _, key = path.partition(".")
            if not sign or section not in _SECTIONS or not key:
                raise InputError(
                    f"'{assignment}' is not of the form section.key=value with a section of {', '.join(_SECTIONS)}"
                )
            try:
                table[section][key] = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise InputError(f"'{assignment}': '{text}' is not a YAML value") from error
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
        """Check and convert plain values.

        Raises:
            InputError: unknown key or wrong type, naming ``source`` and the nearest key.
        """
        _check_keys(table, ["name", "description", *_SECTIONS], source)
        recipe = Recipe(name=str(table.get("name", "")), description=str(table.get("description", "")))
        for section in _SECTIONS:
            defaults = getattr(recipe, section)
            values = table.get(section) or {}
            known = {f.name: getattr(defaults, f.name) for f in fields(defaults)}
            _check_keys(values, list(known), f"{source}, section {section}")
            converted = {k: _convert(v, known[k], f"{source}: {section}.{k}") for k, v in values.items()}
            recipe = replace(recipe, **{section: replace(defaults, **converted)})
        if recipe.evaluation.protocol not in ("activitynet", "wtalc"):
            raise InputError(
                f"{source}: evaluation.protocol is '{recipe.evaluation.protocol}', expected activitynet or wtalc"
            )
        return recipe


_SECTIONS = ("model", "loss", "training", "localization", "evaluation")


def recipe_names() -> list[str]:
    """Names of the recipes that ship with d2net."""
    return sorted(p.name[:-5] for p in resources.files(__package__).iterdir() if p.name.endswith(".yaml"))


def load_recipe(name: str) -> Recipe:
    """Load a recipe by name.

    Raises:
        InputError: no such recipe; the message lists what there is.
    """
    names = recipe_names()
    if name not in names:
        raise InputError(f"unknown recipe '{name}'{_nearest(name, names)}; there are {', '.join(names)}")
    text = (resources.files(__package__) / f"{name}.yaml").read_text(encoding="utf-8")
    return Recipe.from_dict({"name": name, **yaml.safe_load(text)}, source=f"recipe {name}")


def _nearest(word: str, words: list[str]) -> str:
    near = difflib.get_close_matches(word, words, n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def _check_keys(table: object, known: list[str], source: str) -> None:
    if not isinstance(table, dict):
        raise InputError(f"{source}: expected keys and values, found {type(table).__name__}")
    for key in table:
        if key not in known:
            raise InputError(f"{source}: unknown key '{key}'{_nearest(str(key), known)}; known are {', '.join(known)}")


def _convert(value: object, default: object, where: str) -> object:
    if isinstance(default, tuple):
        if isinstance(value, (list, tuple)) and value and all(isinstance(v, (int, float)) for v in value):
            return tuple(float(v) for v in value)
        expected = "a list of numbers"
    elif isinstance(default, bool):
        if isinstance(value, bool):
            return value
        expected = "true or false"
    elif default is None or isinstance(default, int):
        if (isinstance(value, int) and not isinstance(value, bool)) or (value is None and default is None):
            return value
        expected = "an integer"
    elif isinstance(default, float):
        try:  # YAML reads 1e-4 as a string
            return float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            expected = "a number"
    else:
        if isinstance(value, str):
            return value
        expected = "a text"
    raise InputError(f"{where}: expected {expected}, found {value!r}")
