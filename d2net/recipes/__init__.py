"""Recipes: every number of an experiment, by name.

A recipe is a YAML file beside this module that only sets values; what the values mean, and the paper's value
as default, is said once, in the dataclasses below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from d2net.errors import InputError
from d2net.words import did_you_mean


@dataclass(frozen=True)
class ModelRecipe:
    """The network (Fig. 2)."""

    embedding_dim: int | None = None  # width of x(t); None: the width of a stream
    kernel_size: int = 3  # of every temporal convolution; (3, 1) on THUMOS14, (5, 2) on ActivityNet1.2
    dilation: int = 1
    classifier_kernel_size: int | None = None  # of the third convolution alone; None: kernel_size
    residual: bool = False  # add a layer's input to its output (the released code does)
    dropout: float = 0.0  # before the classifier
    dropout_embeddings: bool = False  # in training, x(t) is what has passed the dropout (the released code)
    weight_std: float | None = None  # weights from N(0, weight_std), biases 0; None: PyTorch's initialisation


@dataclass(frozen=True)
class LossRecipe:
    """Eq. 1 to 11; docs/fidelity.md says which values are the paper's and which the released code's."""

    classification: Literal["discriminative", "focal", "cross_entropy"] = "discriminative"  # Table 3
    denoising: Literal["pdmi", "dmi", "l1", "bce"] = "pdmi"  # L_D; Eq. 7, Eq. 5 and Table 4
    alpha_snippet: float = 0.2  # weight of L_DS; the paper's alpha (Eq. 1) for both terms; 0 leaves the term out
    alpha_video: float = 0.2  # weight of L_DV; 0 leaves the term out
    topk_divisor: int = 8  # p is the mean of the ceil(s / topk_divisor) largest activations
    min_snippets: int = 1  # shorter recordings are skipped
    skip_unlabelled: bool = False  # recordings without a label are skipped

    # L_Dis
    beta: float = 2.0  # focusing parameter (Eq. 4)
    gamma: float = 0.01  # intra-class compactness (Eq. 3)
    threshold: float = 0.5  # tau on the foreground attention (Eq. 2)
    background_threshold: float = 0.5  # tau on the background attention (Eq. 2)
    threshold_inclusive: bool = False  # whether a snippet exactly at tau counts
    embedding_pooling: Literal["sum", "mean"] = "sum"  # mean: Eq. 2 divided by the sum of its weights
    pairing: Literal["different", "permutation"] = "different"  # x~ of Eq. 3: see DiscriminativeLoss
    probability_floor: float = 1e-6  # p is clamped to [floor, 1 - floor] before the logarithm
    class_reduction: Literal["sum", "mean"] = "sum"  # of Eq. 4 over the classes
    balance_classes: bool = False  # multiply the terms of positive classes by C

    # x_ref (Eq. 8)
    momentum: float = 0.9
    reference_update: Literal["background", "lowest_attention"] = "background"
    # background: mean of x_bg; lowest_attention: mean of the one snippet with the lowest attention of each recording

    # L_DS (Eq. 9)
    snippet_fg_threshold: float = 0.5  # pseudo-foreground where lambda' is above
    snippet_bg_threshold: float = 0.5  # pseudo-background where lambda' is below
    snippet_own_classes: bool = False  # activations of the pseudo-foreground: maximum over the recording's own classes
    snippet_normalization: Literal["joint", "per_class"] = "joint"  # Y_1 / z, or each column by its own count
    snippet_entry_floor: float = 0.0  # entries of U_1 are clamped from below
    snippet_rank_tol: float = 1e-5  # singular values of U_1 up to this are zero

    # L_DV (Eq. 10)
    video_peak_share: float | None = None  # p where above this share of its maximum, else 0, then sum 1; None: p
    video_normalization: Literal["joint", "per_class"] = "joint"  # Y_2 / n, or each class by its own count

    # Uncertainty modelling (Lee et al., AAAI 2021) beside the paper's terms
    um_weight: float = 0.0  # weight of um_magnitude * magnitude term + background entropy; 0 leaves the term out
    um_magnitude: float = 5e-4
    um_margin: float = 100.0  # the magnitude that foreground embeddings should reach


@dataclass(frozen=True)
class TrainingRecipe:
    """Sec. 4, implementation details."""

    iterations: int = 20_000
    batch_size: int = 10
    learning_rate: float = 1e-4
    weight_decay: float = 0.005
    ema_decay: float = 0.0  # the result is an exponential moving average of the weights, with this decay; 0: the last
    # weights. The initial ones have no share: of n iterations the last counts (1 - ema_decay) / (1 - ema_decay^n)
    max_snippets: int = 750  # longer recordings are cropped at random to this many snippets
    denoising_start: int = 0  # L_D is on from this iteration (counted from 0) ...
    denoising_every: int = 1  # ... whenever the iteration is a multiple of this


@dataclass(frozen=True)
class LocalizationRecipe:
    """Sec. 3.3."""

    attention: bool = True  # refine the TCAM with the bottom-up attention (r_c = lambda' T_c)
    attention_peak: float | None = None  # lambda' is scaled to this maximum; None: as it is
    class_scores: Literal["tcam", "refined"] = "tcam"  # which sequence the class scores p are pooled from
    topk_divisor: int = 8
    topk_rounding: Literal["ceil", "floor"] = "ceil"  # k = max(1, s / topk_divisor, rounded like this)
    class_rule: Literal["relative", "absolute"] = "relative"
    class_threshold: float = 0.5  # a class is kept when p > class_threshold * max(p), or (absolute) p > class_threshold
    class_threshold_high: float | None = None  # absolute: takes its place in a recording where some p is above it
    max_classes: int | None = None  # keep only classes whose p is above the (max_classes + 1)-th best; None: no limit
    thresholds: tuple[float, ...] = tuple(round(0.025 * i, 3) for i in range(1, 21))
    min_length: int = 1  # snippets
    inflation: float = 0.25  # width of each outer neighbourhood, as a share of the proposal's
    outer: Literal["pooled", "mean_of_sides"] = "pooled"  # S_o: mean of both sides' snippets, or of the sides' means
    min_contrast: float | None = None  # proposals with a lower S_i - S_o are dropped before NMS
    nms_iou: float = 0.5
    score_floor: float = 0.1  # S_th as a share of the best score ...
    score_floor_scope: Literal["recording", "class"] = "recording"  # ... S > S_th of the recording's best, or
    # S >= S_th of the best of the same class and recording


@dataclass(frozen=True)
class EvaluationRecipe:
    """What is reported."""

    protocol: Literal["activitynet", "wtalc"] = "activitynet"
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
                near = "" if section in _SECTIONS else did_you_mean(section, list(_SECTIONS))
                raise InputError(
                    f"'{assignment}' is not of the form section.key=value{near}; sections are {', '.join(_SECTIONS)}"
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
            types = get_type_hints(type(defaults))
            _check_keys(values, list(types), f"{source}, section {section}")
            converted = {k: _convert(v, types[k], f"{source}: {section}.{k}") for k, v in values.items()}
            recipe = replace(recipe, **{section: replace(defaults, **converted)})
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
        raise InputError(f"unknown recipe '{name}'{did_you_mean(name, names)}; there are {', '.join(names)}")
    text = (resources.files(__package__) / f"{name}.yaml").read_text(encoding="utf-8")
    return Recipe.from_dict({"name": name, **yaml.safe_load(text)}, source=f"recipe {name}")


def differences(recipes: Sequence[Recipe]) -> list[tuple[str, list[object]]]:
    """``section.key`` and the recipes' values, of every setting in which they are not all the same."""
    tables = [recipe.to_dict() for recipe in recipes]
    rows = []
    for section in _SECTIONS:
        for key in tables[0][section]:
            values = [table[section][key] for table in tables]
            if any(value != values[0] for value in values):
                rows.append((f"{section}.{key}", values))
    return rows


def _check_keys(table: object, known: list[str], source: str) -> None:
    if not isinstance(table, dict):
        raise InputError(f"{source}: expected keys and values, found {type(table).__name__}")
    for key in table:
        if key not in known:
            raise InputError(
                f"{source}: unknown key '{key}'{did_you_mean(str(key), known)}; known are {', '.join(known)}"
            )


def _convert(value: object, wanted: Any, where: str) -> object:
    """The value as the type that a recipe's field is annotated with."""
    choices = get_args(wanted)
    if get_origin(wanted) is UnionType:  # "X | None"
        if value is None:
            return None
        optional = " or null"
        wanted = next(c for c in choices if c is not NoneType)
    else:
        optional = ""
    if get_origin(wanted) is Literal:
        if value in choices:
            return value
        near = did_you_mean(str(value), list(choices))
        raise InputError(f"{where}: '{value}' is not known{near}; expected {' or '.join(choices)}")
    if get_origin(wanted) is tuple:
        if isinstance(value, (list, tuple)) and value and all(isinstance(v, (int, float)) for v in value):
            return tuple(float(v) for v in value)
        expected = "a list of numbers"
    elif wanted is bool:
        if isinstance(value, bool):
            return value
        expected = "true or false"
    elif wanted is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        expected = "an integer"
    else:
        try:  # YAML reads 1e-4 as a string
            if not isinstance(value, bool):
                return float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            pass
        expected = "a number"
    raise InputError(f"{where}: expected {expected}{optional}, found {value!r}")
