"""The settings of an experiment, section by section: what each means and may be. The defaults are the paper's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from d2net.errors import InputError
from d2net.fields import LARGEST_COUNT, Count, Fraction, Number, Positive, Range, Weight, check_fields


def setting(default: Any, meaning: str) -> Any:
    """A field of a section: its default, and what it means, for the files that ``d2net recipes`` prints."""
    return field(default=default, metadata={"meaning": meaning})


Width = Annotated[int, Range(1, 65_536)]
QueueSize = Annotated[int, Range(0, 65_536)]
KernelSize = Annotated[int, Range(1, 1_023, odd=True)]  # odd, so that time stays aligned
Eps = Annotated[float, Range(1e-7, below=0.5)]  # smaller ones would make 1 - eps equal to 1 in float32
BelowOne = Annotated[float, Range(0, below=1)]
Deviation = Annotated[float, Range(above=0, at_most=10)]
Overlap = Annotated[float, Range(above=0, at_most=1)]
AboveChance = Annotated[float, Range(above=0.5, at_most=1)]


class Section:
    """Settings that are checked when they are made: by name, in a file, in Python.

    Raises:
        InputError: a wrong type, or a number beyond the range that its field is annotated with.
    """

    def __post_init__(self) -> None:
        check_fields(self, f"{type(self).__name__.removesuffix('Recipe').lower()}.")


@dataclass(frozen=True)
class ModelRecipe(Section):
    """The network (Fig. 2)."""

    standardize: bool = setting(
        False, "features minus their mean over the training data, over their standard deviation"
    )
    embedding_dim: Width | None = setting(None, "width of x(t); null: the width of a stream")
    kernel_size: KernelSize = setting(3, "of every temporal convolution; (3, 1) on THUMOS14, (5, 2) on ActivityNet1.2")
    dilation: Annotated[int, Range(1, 1_024)] = setting(1, "of every temporal convolution")
    classifier_kernel_size: KernelSize | None = setting(None, "of the third convolution alone; null: kernel_size")
    residual: bool = setting(False, "add a layer's input to its output (the released code does)")
    dropout: BelowOne = setting(0.0, "before the classifier")
    dropout_embeddings: bool = setting(False, "in training, x(t) is what has passed the dropout (the released code)")
    weight_std: Deviation | None = setting(None, "weights from N(0, weight_std), biases 0; null: as PyTorch does")


@dataclass(frozen=True)
class LossRecipe(Section):
    """Eq. 1 to 11; docs/fidelity.md says which values are the paper's and which the released code's."""

    classification: Literal["discriminative", "focal", "cross_entropy"] = setting(
        "discriminative", "L_Dis (Eq. 2-4), or one of Table 3"
    )
    denoising: Literal["pdmi", "dmi", "l1", "bce"] = setting("pdmi", "L_D; Eq. 7, Eq. 5 and Table 4")
    alpha_snippet: Weight = setting(0.2, "weight of L_DS: alpha of Eq. 1; 0 leaves the term out")
    alpha_video: Weight = setting(0.2, "weight of L_DV: alpha of Eq. 1; 0 leaves the term out")
    topk_divisor: Count = setting(8, "p is the mean of the ceil(s / topk_divisor) largest activations")
    min_snippets: Count = setting(1, "shorter recordings are skipped")
    skip_unlabelled: bool = setting(False, "recordings without a label are skipped")

    # L_Dis
    beta: Weight = setting(2.0, "focusing parameter (Eq. 4)")
    gamma: Weight = setting(0.01, "intra-class compactness (Eq. 3)")
    threshold: Fraction = setting(0.5, "tau on the foreground attention (Eq. 2)")
    background_threshold: Fraction = setting(0.5, "tau on the background attention (Eq. 2)")
    threshold_inclusive: bool = setting(False, "whether a snippet exactly at tau counts")
    embedding_pooling: Literal["sum", "mean"] = setting("sum", "mean: Eq. 2 divided by the sum of its weights")
    pairing: Literal["different", "permutation"] = setting(
        "different", "x~ of Eq. 3: another recording, or a random permutation"
    )
    probability_floor: Eps = setting(1e-6, "p is clamped to [floor, 1 - floor] before the logarithm")
    class_reduction: Literal["sum", "mean"] = setting("sum", "of Eq. 4 over the classes")
    balance_classes: bool = setting(False, "multiply the terms of positive classes by C")

    # x_ref (Eq. 8)
    momentum: Fraction = setting(0.9, "x_ref = momentum * x_ref + (1 - momentum) * background of the batch")
    reference_update: Literal["background", "lowest_attention"] = setting(
        "background", "mean of x_bg, or of the one snippet of each recording with the lowest attention"
    )

    # L_DS (Eq. 9)
    snippet_fg_threshold: Fraction = setting(0.5, "pseudo-foreground where lambda' is above")
    snippet_bg_threshold: Fraction = setting(0.5, "pseudo-background where lambda' is below")
    snippet_own_classes: bool = setting(False, "of the pseudo-foreground: maximum over the recording's own classes")
    snippet_normalization: Literal["joint", "per_class"] = setting("joint", "Y_1 / z, or each column by its own count")
    snippet_entry_floor: Fraction = setting(0.0, "entries of U_1 are clamped from below")
    snippet_rank_tol: Weight = setting(1e-5, "singular values of U_1 up to this are zero")
    snippet_oriented: bool = setting(False, "recordings with det U_1 <= 0, which L_DS would sharpen, do not count")

    # L_DV (Eq. 10)
    video_peak_share: BelowOne | None = setting(None, "p where above this share of its maximum, then of sum 1; null: p")
    video_normalization: Literal["joint", "per_class"] = setting("joint", "Y_2 / n, or each class by its own count")
    video_queue: QueueSize = setting(0, "U_2 is of the batch and so many recordings before it; 0: of the batch")

    # Uncertainty modelling (Lee et al., AAAI 2021) beside the paper's terms
    um_weight: Weight = setting(0.0, "weight of um_magnitude * magnitude term + background entropy; 0: none")
    um_magnitude: Weight = setting(5e-4, "weight of the magnitude term within it")
    um_margin: Weight = setting(100.0, "the magnitude that foreground embeddings should reach")
    um_margin_unit: Literal["absolute", "embedding"] = setting(
        "absolute", "embedding: margin and norms in units of the mean ||x(t)|| of the batch"
    )


@dataclass(frozen=True)
class TrainingRecipe(Section):
    """Sec. 4, implementation details."""

    iterations: Count = setting(20_000, "steps of the optimizer")
    batch_size: Count = setting(10, "recordings of a step; all, where there are fewer")
    learning_rate: Annotated[float, Range(above=0, at_most=1e30)] = setting(1e-4, "of Adam")
    weight_decay: Weight = setting(0.005, "of Adam: L2")
    ema_decay: BelowOne = setting(
        0.0, "the result is an exponential moving average of the weights, without the initial ones; 0: the last"
    )
    max_snippets: Count = setting(
        750, "longer recordings are cropped at random to this many snippets (the paper names no number)"
    )
    denoising_start: Annotated[int, Range(0, LARGEST_COUNT)] = setting(
        0, "L_D is on from this iteration on, counted from 0 ..."
    )
    denoising_every: Count = setting(1, "... whenever the iteration is a multiple of this")
    denoising_agreement: AboveChance | None = setting(
        None, "... and once lambda' and lambda agree this well: a running AUC, 0.5 is chance; null: not asked"
    )


@dataclass(frozen=True)
class LocalizationRecipe(Section):
    """Sec. 3.3."""

    attention: bool = setting(True, "refine the TCAM with the bottom-up attention (r_c = lambda' T_c)")
    attention_peak: Positive | None = setting(None, "lambda' is scaled to this maximum; null: as it is")
    class_scores: Literal["tcam", "refined"] = setting("tcam", "which sequence the class scores p are pooled from")
    topk_divisor: Count = setting(8, "p is the mean of the k = s / topk_divisor largest activations of s snippets")
    topk_rounding: Literal["ceil", "floor"] = setting("ceil", "of k, which is at least 1")
    class_rule: Literal["relative", "absolute"] = setting("relative", "how class_threshold is meant")
    class_threshold: Number = setting(0.5, "a class is kept when p > class_threshold * max(p), or (absolute) p > it")
    class_threshold_high: Number | None = setting(
        None, "absolute: takes its place where some p of the recording is above it"
    )
    max_classes: Count | None = setting(
        None, "only classes whose p is above the (max_classes + 1)-th best; null: no limit"
    )
    thresholds: tuple[Number, ...] = setting(
        tuple(round(0.025 * i, 3) for i in range(1, 21)), "of the activations: stretches above each are proposals"
    )
    min_length: Count = setting(1, "of a proposal, in snippets")
    inflation: Annotated[float, Range(0, 1_000)] = setting(
        0.25, "width of each outer neighbourhood, in widths of the proposal"
    )
    outer: Literal["pooled", "mean_of_sides"] = setting(
        "pooled", "S_o: mean of both sides' snippets, or of the sides' means"
    )
    min_contrast: Number | None = setting(None, "proposals with a lower S_i - S_o are dropped before NMS")
    nms_iou: Overlap = setting(0.5, "of two proposals of a class with at least this IoU the better one stays")
    score_floor: BelowOne = setting(0.1, "S_th as a share of the best score ...")
    score_floor_scope: Literal["recording", "class"] = setting(
        "recording", "... of the recording (S > S_th), or of the class in it (S >= S_th)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = Range(0, below=1)
        if self.class_rule == "relative" and self.class_threshold not in allowed:
            raise InputError(
                f"localization.class_threshold is {self.class_threshold:g}; it must be {allowed}, a fraction of the "
                "best p, where localization.class_rule is relative"
            )


@dataclass(frozen=True)
class EvaluationRecipe(Section):
    """What is reported."""

    protocol: Literal["activitynet", "wtalc"] = setting("activitynet", "see docs/evaluation.md")
    tiou: tuple[Overlap, ...] = setting((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7), "temporal IoUs of mAP")
