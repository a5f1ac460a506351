"""From temporal class activation maps to scored segments in snippets (Sec. 3.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from d2net.errors import InputError
from d2net.ops.checks import as_tensor, valid_mask
from d2net.ops.packed import padded
from d2net.ops.proposals import Proposals, extract_proposals, read_packing
from d2net.ops.topk_pool import topk_pool
from d2net.recipes import LocalizationRecipe, Recipe, load_recipe


class Localizer:
    """Turns TCAMs of any model into scored segments.

    Args:
        recipe: The settings of Sec. 3.3.
    """

    def __init__(self, recipe: LocalizationRecipe) -> None:
        self.recipe = recipe

    @staticmethod
    def from_recipe(name: str, **overrides: object) -> Localizer:
        """The localizer of a recipe.

        Args:
            name: Of the recipe.
            overrides: Settings of ``LocalizationRecipe`` that replace those of the recipe.

        Raises:
            InputError: an unknown recipe or setting (the nearest is named), or a value out of range.
        """
        table = load_recipe(name).to_dict()
        table["localization"].update(overrides)
        return Localizer(Recipe.from_dict(table, source=f"localizer of recipe {name}").localization)

    @torch.no_grad()
    def __call__(
        self,
        tcam: Tensor,
        attention: Tensor | None = None,
        lengths: Tensor | None = None,
        *,
        offsets: Tensor | None = None,
        max_length: int | None = None,
    ) -> Proposals:
        """Localize the actions of a batch, or of one recording, without the batch dimension.

        1. The activations are refined: r_c = lambda' T_c.
        2. Classes with p > ``class_threshold`` * max(p) are kept, where p is the top-k pooled TCAM. A recording without
           a positive p keeps none.
        3. The refined activations of these classes give the proposals (:func:`d2net.ops.extract_proposals`).
        4. Proposals with S > S_th = ``score_floor`` * (the recording's largest S) are kept. A recording without a
           positive S keeps none.

        The settings of ``LocalizationRecipe`` give variants of every step.

        Args:
            tcam: (B, T, C) or (T, C) class activations; (N, C) with ``offsets``. Arrays and lists are converted.
            attention: (B, T) or (T,) bottom-up attention lambda' (Eq. 8), or (N,). With None, or with
                ``attention: false`` in the recipe, the TCAM is not refined.
            lengths: (B,) valid snippets of each recording (None: all T). Later snippets never matter.
            offsets: (B+1,) the first row of each recording in a packed batch (:mod:`d2net.ops`).
            max_length: Of a packed batch, an upper bound of the lengths.

        Returns:
            Proposals by recording, class and falling score, in snippets.

        Raises:
            InputError: wrong shapes, lengths of a packed batch that do not fit, or NaN or Inf within a recording.
        """
        tcam = as_tensor("Localizer", "tcam", tcam)
        if attention is not None:
            attention = as_tensor("Localizer", "attention", attention, tcam)
        if lengths is not None:
            lengths = as_tensor("Localizer", "lengths", lengths, tcam)
        if offsets is not None or max_length is not None:
            return self._packed(tcam, attention, lengths, offsets, max_length)
        if tcam.ndim == 2:
            tcam = tcam[None]
            attention = None if attention is None else attention[None]
        if tcam.ndim != 3 or not tcam.is_floating_point():
            raise InputError(f"tcam is {tuple(tcam.shape)} {tcam.dtype}, expected (B, T, C) or (T, C) of a float type")
        batch, snippets, _ = tcam.shape
        if attention is not None and attention.shape != (batch, snippets):
            raise InputError(
                f"attention has shape {tuple(attention.shape)}, expected one value a snippet, ({batch}, {snippets})"
            )
        if lengths is not None:
            if lengths.shape != (batch,):
                raise InputError(f"lengths have shape {tuple(lengths.shape)}, expected ({batch},)")
            lengths = lengths.to(tcam.device)
        refined = tcam
        if attention is not None and self.recipe.attention:
            _check_finite("attention", attention, lengths)
            refined = tcam * self._scaled(attention, lengths)[..., None]
        proposals = extract_proposals(
            refined,
            self._classes(refined if self.recipe.class_scores == "refined" else tcam, tcam, lengths),
            lengths,
            thresholds=self.recipe.thresholds,
            min_length=self.recipe.min_length,
            inflation=self.recipe.inflation,
            outer=self.recipe.outer,
            nms_iou=self.recipe.nms_iou,
            min_contrast=-math.inf if self.recipe.min_contrast is None else self.recipe.min_contrast,
        )
        return self._above_score_threshold(proposals, batch, classes=tcam.shape[2])

    def _packed(
        self,
        tcam: Tensor,
        attention: Tensor | None,
        lengths: Tensor | None,
        offsets: Tensor | None,
        max_length: int | None,
    ) -> Proposals:
        """:meth:`__call__` of (N, C) and (N,). They are copied to (B, T, ...): activations are few."""
        if tcam.ndim != 2:
            raise InputError(f"tcam has shape {tuple(tcam.shape)}, expected (N, C) with offsets")
        if attention is not None and attention.shape != tcam.shape[:1]:
            raise InputError(f"attention has shape {tuple(attention.shape)}, expected one value a row, ({len(tcam)},)")
        packing = read_packing("Localizer", tcam, lengths, offsets, max_length)
        attention = None if attention is None else padded(attention, *packing)
        return self(padded(tcam, *packing), attention, packing.lengths)

    def _scaled(self, attention: Tensor, lengths: Tensor | None) -> Tensor:
        """lambda' (B, T), scaled such that its maximum within each recording is ``attention_peak``."""
        if self.recipe.attention_peak is None or attention.shape[1] == 0:
            return attention
        valid = valid_mask("Localizer", attention, lengths)
        largest = attention.masked_fill(~valid, 0).amax(1, keepdim=True)
        return attention * self.recipe.attention_peak / torch.where(largest > 0, largest, 1)

    def _classes(self, sequences: Tensor, tcam: Tensor, lengths: Tensor | None) -> Tensor:
        """(B, C) bool: the classes to look for, from ``sequences`` (B, T, C), which are pooled over time."""
        recipe = self.recipe
        pool = topk_pool if recipe.topk_rounding == "ceil" else _topk_pool_rounding_down
        pooled = pool(sequences, lengths, divisor=recipe.topk_divisor)
        # NaN and +Inf are always among the k largest, so it suffices to look at the means.
        if not pooled.isfinite().all():
            _check_finite("tcam", tcam, lengths)
        if pooled.shape[1] == 0:
            return pooled > 0
        best = pooled.amax(dim=1, keepdim=True)
        if recipe.class_rule == "relative":
            # Never true where p <= 0, as class_threshold is below 1.
            classes = pooled > recipe.class_threshold * best
        else:
            threshold = torch.full_like(best, recipe.class_threshold)
            if recipe.class_threshold_high is not None:
                threshold = torch.where(best > recipe.class_threshold_high, recipe.class_threshold_high, threshold)
            classes = pooled > threshold
        if recipe.max_classes is not None and recipe.max_classes < pooled.shape[1]:
            classes &= pooled > pooled.sort(dim=1, descending=True).values[:, recipe.max_classes, None]
        return classes

    def _above_score_threshold(self, proposals: Proposals, batch: int, classes: int) -> Proposals:
        """The proposals above S_th, or at it with a threshold per class."""
        fraction = self.recipe.score_floor
        if self.recipe.score_floor_scope == "class":
            group = proposals.recording * classes + proposals.label
            none = proposals.score.new_full((batch * classes,), -torch.inf)
            best = none.scatter_reduce(0, group, proposals.score, reduce="amax")[group]
            keep = proposals.score >= fraction * best
        else:
            # The maximum starts at 0, so a recording without a positive score keeps nothing.
            none = proposals.score.new_zeros(batch)
            best = none.scatter_reduce(0, proposals.recording, proposals.score, reduce="amax")[proposals.recording]
            keep = proposals.score > fraction * best
        return Proposals(*(x[keep] for x in proposals))


def _topk_pool_rounding_down(x: Tensor, lengths: Tensor | None, *, divisor: int) -> Tensor:
    """:func:`topk_pool` with k = max(1, floor(length / divisor))."""
    valid = valid_mask("Localizer", x, lengths)
    length = valid.sum(1, keepdim=True)
    k = (length // divisor).clamp(min=1)
    top = x.masked_fill(~valid[:, :, None], -torch.inf).sort(dim=1, descending=True).values
    counts = torch.arange(x.shape[1], device=x.device) < torch.minimum(k, length)
    return torch.where(counts[:, :, None], top, 0).sum(1) / k


def _check_finite(name: str, x: Tensor, lengths: Tensor | None) -> None:
    """Raises InputError for NaN or Inf in ``x``, (B, T) or (B, T, C), before a recording's length."""
    bad = ~x.isfinite()
    bad = bad.any(dim=2) if bad.ndim == 3 else bad
    if lengths is not None:
        bad &= torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    if bad.any():
        recording, snippet = bad.nonzero()[0].tolist()
        raise InputError(
            f"{name} holds NaN or Inf (first in recording {recording}, snippet {snippet}); "
            "check the features and the model's training"
        )
