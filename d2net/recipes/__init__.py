"""Recipes: every number of an experiment, by name.

A recipe is a YAML file beside this module that only sets values; what the values mean, and the paper's value
as default, is said once, in the dataclasses below.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from typing import Annotated, Any, Literal

import yaml

from d2net.errors import InputError
from d2net.fields import LARGEST_COUNT, Count, Fraction, Number, Positive, Range, Weight, check_fields
from d2net.words import did_you_mean, quoted, reason

_DECIMAL = re.compile(
    r"[-+]?(?:(?:0|[1-9][0-9]*)|(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|\.inf|\.nan)", re.ASCII | re.IGNORECASE
)
LONGEST_SETTING = 2000  # characters of a setting on the command line

Width = Annotated[int, Range(1, 65_536)]
KernelSize = Annotated[int, Range(1, 1_023, odd=True)]  # odd, so that time stays aligned
Eps = Annotated[float, Range(1e-7, below=0.5)]  # smaller ones would make 1 - eps equal to 1 in float32
BelowOne = Annotated[float, Range(0, below=1)]
Deviation = Annotated[float, Range(above=0, at_most=10)]
Overlap = Annotated[float, Range(above=0, at_most=1)]


class _Section:
    """Settings that are checked when they are made: by name, in a file, in Python.

    Raises:
        InputError: a wrong type, or a number beyond the range that its field is annotated with.
    """

    def __post_init__(self) -> None:
        check_fields(self, f"{type(self).__name__.removesuffix('Recipe').lower()}.")


@dataclass(frozen=True)
class ModelRecipe(_Section):
    """The network (Fig. 2)."""

    embedding_dim: Width | None = None  # width of x(t); None: the width of a stream
    kernel_size: KernelSize = 3  # of every temporal convolution; (3, 1) on THUMOS14, (5, 2) on ActivityNet1.2
    dilation: Annotated[int, Range(1, 1_024)] = 1
    classifier_kernel_size: KernelSize | None = None  # of the third convolution alone; None: kernel_size
    residual: bool = False  # add a layer's input to its output (the released code does)
    dropout: BelowOne = 0.0  # before the classifier
    dropout_embeddings: bool = False  # in training, x(t) is what has passed the dropout (the released code)
    weight_std: Deviation | None = None  # weights from N(0, weight_std), biases 0; None: PyTorch's initialisation


@dataclass(frozen=True)
class LossRecipe(_Section):
    """Eq. 1 to 11; docs/fidelity.md says which values are the paper's and which the released code's."""

    classification: Literal["discriminative", "focal", "cross_entropy"] = "discriminative"  # Table 3
    denoising: Literal["pdmi", "dmi", "l1", "bce"] = "pdmi"  # L_D; Eq. 7, Eq. 5 and Table 4
    alpha_snippet: Weight = 0.2  # weight of L_DS; the paper's alpha (Eq. 1) for both terms; 0 leaves the term out
    alpha_video: Weight = 0.2  # weight of L_DV; 0 leaves the term out
    topk_divisor: Count = 8  # p is the mean of the ceil(s / topk_divisor) largest activations
    min_snippets: Count = 1  # shorter recordings are skipped
    skip_unlabelled: bool = False  # recordings without a label are skipped

    # L_Dis
    beta: Weight = 2.0  # focusing parameter (Eq. 4)
    gamma: Weight = 0.01  # intra-class compactness (Eq. 3)
    threshold: Fraction = 0.5  # tau on the foreground attention (Eq. 2)
    background_threshold: Fraction = 0.5  # tau on the background attention (Eq. 2)
    threshold_inclusive: bool = False  # whether a snippet exactly at tau counts
    embedding_pooling: Literal["sum", "mean"] = "sum"  # mean: Eq. 2 divided by the sum of its weights
    pairing: Literal["different", "permutation"] = "different"  # x~ of Eq. 3: see DiscriminativeLoss
    probability_floor: Eps = 1e-6  # p is clamped to [eps, 1 - eps] before the logarithm, eps being this
    class_reduction: Literal["sum", "mean"] = "sum"  # of Eq. 4 over the classes
    balance_classes: bool = False  # multiply the terms of positive classes by C

    # x_ref (Eq. 8)
    momentum: Fraction = 0.9
    reference_update: Literal["background", "lowest_attention"] = "background"
    # background: mean of x_bg; lowest_attention: mean of the one snippet with the lowest attention of each recording

    # L_DS (Eq. 9)
    snippet_fg_threshold: Fraction = 0.5  # pseudo-foreground where lambda' is above
    snippet_bg_threshold: Fraction = 0.5  # pseudo-background where lambda' is below
    snippet_own_classes: bool = False  # activations of the pseudo-foreground: maximum over the recording's own classes
    snippet_normalization: Literal["joint", "per_class"] = "joint"  # Y_1 / z, or each column by its own count
    snippet_entry_floor: Fraction = 0.0  # smaller entries of U_1 are raised to this
    snippet_rank_tol: Weight = 1e-5  # singular values of U_1 up to this count as zero

    # L_DV (Eq. 10)
    video_peak_share: BelowOne | None = None  # p above this fraction of its maximum, else 0, scaled to sum 1; None: p
    video_normalization: Literal["joint", "per_class"] = "joint"  # Y_2 / n, or each class by its own count

    # Uncertainty modelling (Lee et al., AAAI 2021) beside the paper's terms
    um_weight: Weight = 0.0  # weight of um_magnitude * magnitude term + background entropy; 0 leaves the term out
    um_magnitude: Weight = 5e-4
    um_margin: Weight = 100.0  # the magnitude that foreground embeddings should reach


@dataclass(frozen=True)
class TrainingRecipe(_Section):
    """Sec. 4, implementation details."""

    iterations: Count = 20_000
    batch_size: Count = 10
    learning_rate: Annotated[float, Range(above=0, at_most=1e30)] = 1e-4
    weight_decay: Weight = 0.005
    ema_decay: BelowOne = 0.0  # the result is an exponential moving average of the weights, with this decay; 0: the
    # last weights. The initial ones do not enter: after n steps the last count (1 - ema_decay) / (1 - ema_decay^n)
    max_snippets: Count = 750  # longer recordings are cropped at random to this many snippets
    denoising_start: Annotated[int, Range(0, LARGEST_COUNT)] = 0  # L_D is on from this iteration (counted from 0) ...
    denoising_every: Count = 1  # ... whenever the iteration is a multiple of this


@dataclass(frozen=True)
class LocalizationRecipe(_Section):
    """Sec. 3.3."""

    attention: bool = True  # refine the TCAM with the bottom-up attention (r_c = lambda' T_c)
    attention_peak: Positive | None = None  # lambda' is scaled to this maximum; None: it is not scaled
    class_scores: Literal["tcam", "refined"] = "tcam"  # which sequence the class scores p are pooled from
    topk_divisor: Count = 8
    topk_rounding: Literal["ceil", "floor"] = "ceil"  # k = max(1, s / topk_divisor, rounded like this)
    class_rule: Literal["relative", "absolute"] = "relative"
    class_threshold: Number = 0.5  # a class is kept when p > class_threshold * max(p), or (absolute) p > it
    class_threshold_high: Number | None = None  # absolute: replaces class_threshold where some p is above it
    max_classes: Count | None = None  # keep only classes whose p is above the (max_classes + 1)-th best; None: no limit
    thresholds: tuple[Number, ...] = tuple(round(0.025 * i, 3) for i in range(1, 21))
    min_length: Count = 1  # snippets
    inflation: Annotated[float, Range(0, 1_000)] = 0.25  # width of each outer neighbourhood, in widths of the proposal
    outer: Literal["pooled", "mean_of_sides"] = "pooled"  # S_o: mean of both sides' snippets, or of the sides' means
    min_contrast: Number | None = None  # proposals with a lower S_i - S_o are dropped before NMS
    nms_iou: Overlap = 0.5
    score_floor: BelowOne = 0.1  # S_th is this fraction of the best score
    score_floor_scope: Literal["recording", "class"] = "recording"  # of the recording, and proposals with S > S_th are
    # kept; or of the same class in the recording, and those with S >= S_th are kept

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = Range(0, below=1)
        if self.class_rule == "relative" and self.class_threshold not in allowed:
            raise InputError(
                f"localization.class_threshold is {self.class_threshold:g}; it must be {allowed}, a fraction of the "
                "best p, where localization.class_rule is relative"
            )


@dataclass(frozen=True)
class EvaluationRecipe(_Section):
    """What is reported."""

    protocol: Literal["activitynet", "wtalc"] = "activitynet"
    tiou: tuple[Overlap, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


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
            if not sign or section not in _SECTIONS or not key:
                near = "" if section in _SECTIONS else did_you_mean(section, _SECTIONS)
                raise InputError(
                    f"{quoted(assignment)} is not of the form section.key=value{near}; sections are "
                    f"{', '.join(_SECTIONS)}"
                )
            if len(text) > LONGEST_SETTING:
                raise InputError(f"{quoted(assignment)} has more than {LONGEST_SETTING} characters; shorten it")
            table[section][key] = _read_yaml(text, quoted(assignment))
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
        _check_keys(table, [f.name for f in fields(Recipe)], source)
        values = {"name": "", **table}
        try:
            for section, made in _SECTIONS.items():
                given = {} if table.get(section) is None else table[section]
                _check_keys(given, [f.name for f in fields(made)], f"section {section}")
                values[section] = made(**given)
            return Recipe(**values)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None


_SECTIONS: dict[str, Any] = {
    "model": ModelRecipe,
    "loss": LossRecipe,
    "training": TrainingRecipe,
    "localization": LocalizationRecipe,
    "evaluation": EvaluationRecipe,
}


def recipe_names() -> list[str]:
    """Names of the recipes that ship with d2net."""
    return sorted(p.name[:-5] for p in resources.files(__package__).iterdir() if p.name.endswith(".yaml"))


def load_recipe(name: str) -> Recipe:
    """Load a recipe by name.

    Raises:
        InputError: no such recipe; the message lists those that exist.
    """
    names = recipe_names()
    if name not in names:
        raise InputError(f"unknown recipe {quoted(name)}{did_you_mean(name, names)}; there are {', '.join(names)}")
    text = (resources.files(__package__) / f"{name}.yaml").read_text(encoding="utf-8")
    return Recipe.from_dict({"name": name, **_read_yaml(text, f"recipe {name}")}, source=f"recipe {name}")


def differences(recipes: Sequence[Recipe]) -> list[tuple[str, list[object]]]:
    """Every setting in which the recipes differ: ``section.key``, and the value of each recipe."""
    tables = [recipe.to_dict() for recipe in recipes]
    rows = []
    for section in _SECTIONS:
        for key in tables[0][section]:
            values = [table[section][key] for table in tables]
            if any(value != values[0] for value in values):
                rows.append((f"{section}.{key}", values))
    return rows


class _PlainLoader(yaml.SafeLoader):
    """Plain values only. Aliases could expand without end, and tags name types that no setting has.

    Numbers are decimal: YAML 1.1 would read 1:30 as 90 and 010 as 8, and take 0x10, 0b1 and 1_000.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if event.anchor is not None or getattr(event, "tag", None) is not None:
            raise yaml.YAMLError("anchors, aliases and tags are not taken")
        return super().compose_node(parent, index)


def _decimal(loader: _PlainLoader, node: yaml.ScalarNode) -> Any:
    number = "construct_yaml_int" if node.tag.endswith(":int") else "construct_yaml_float"
    value = getattr(loader, number)(node)
    if not _DECIMAL.fullmatch(node.value):
        raise yaml.YAMLError(f"{quoted(node.value)} is no number in decimal digits alone")
    return value


for _kind in ("int", "float"):
    _PlainLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _decimal)


def _read_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _PlainLoader)  # noqa: S506 (it is a SafeLoader)
    # ValueError: 5,000 digits, or an impossible date; OverflowError: 1:2:3:... of a hundred parts, in base 60.
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        why = getattr(error, "problem", None) or reason(error)
        raise InputError(f"{where}: not a YAML value ({why}); write a plain one") from None


def _check_keys(table: object, known: list[str], source: str) -> None:
    if not isinstance(table, dict):
        raise InputError(f"{source}: expected keys and values, found {type(table).__name__}")
    for key in table:
        if key not in known:
            near = did_you_mean(str(key), known)
            raise InputError(f"{source}: unknown key {quoted(key)}{near}; known are {', '.join(known)}")
