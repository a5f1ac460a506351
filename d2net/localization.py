"""From temporal class activation maps to detections in seconds (Sec. 3.3)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from d2net.data.dataset import Dataset
from d2net.detections import Detections
from d2net.errors import InputError
from d2net.ops.bottom_up_attention import bottom_up_attention
from d2net.ops.checks import as_tensor, check_kept, valid_mask
from d2net.ops.proposals import Proposals, extract_proposals
from d2net.ops.topk_pool import topk_pool
from d2net.recipes import LocalizationRecipe, Recipe, load_recipe
from d2net.threads import computing, multiply_adds, threads_for


class Localizer:
    """Turns TCAMs into scored segments, for TCAMs of any model.

    Args:
        recipe: The settings of Sec. 3.3.
    """

    def __init__(self, recipe: LocalizationRecipe) -> None:
        self.recipe = recipe

    @staticmethod
    def from_recipe(name: str, **overrides: object) -> Localizer:
        """The localizer of a named recipe, with single settings of ``LocalizationRecipe`` replaced.

        Raises:
            InputError: unknown recipe or setting (the nearest is named), or a value that cannot work.
        """
        table = load_recipe(name).to_dict()
        table["localization"].update(overrides)
        return Localizer(Recipe.from_dict(table, source=f"localizer of recipe {name}").localization)

    @torch.no_grad()
    def __call__(self, tcam: Tensor, attention: Tensor | None = None, lengths: Tensor | None = None) -> Proposals:
        """Localize the actions of a batch (or of one recording, without the batch dimension).

        The activations are refined as r_c = lambda' T_c. Classes with p > ``class_threshold`` * max(p) are kept, p
        being the top-k pooled TCAM; their refined activations give the proposals
        (:func:`d2net.ops.proposals.extract_proposals`); those with S > S_th = ``score_floor`` * (the recording's
        best S) stay. A recording without a positive p or a positive S has no detection. Every step has the
        variants of ``LocalizationRecipe``.

        Args:
            tcam: (B, T, C) or (T, C) class activations. Arrays and lists are converted.
            attention: (B, T) or (T,) bottom-up attention lambda' (Eq. 8); None, or ``attention: false`` in
                the recipe, leaves the TCAM as it is.
            lengths: (B,) valid snippets of each recording (None: all T). What lies past never matters.

        Returns:
            Proposals by recording, class and falling score, in snippets.

        Raises:
            InputError: wrong shapes, or NaN or Inf within a recording.
        """
        tcam = as_tensor("Localizer", "tcam", tcam)
        if attention is not None:
            attention = as_tensor("Localizer", "attention", attention, tcam)
        if lengths is not None:
            lengths = as_tensor("Localizer", "lengths", lengths, tcam)
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
        return self._above_floor(proposals, batch, classes=tcam.shape[2])

    def _scaled(self, attention: Tensor, lengths: Tensor | None) -> Tensor:
        """lambda' (B, T), scaled to ``attention_peak`` within each recording."""
        if self.recipe.attention_peak is None or attention.shape[1] == 0:
            return attention
        valid = valid_mask("Localizer", attention, lengths)
        peak = attention.masked_fill(~valid, 0).amax(1, keepdim=True)
        return attention * self.recipe.attention_peak / torch.where(peak > 0, peak, 1)

    def _classes(self, sequences: Tensor, tcam: Tensor, lengths: Tensor | None) -> Tensor:
        """(B, C) bool: the classes to look for, by the pooled (B, T, C) sequences."""
        recipe = self.recipe
        pool = topk_pool if recipe.topk_rounding == "ceil" else _floor_topk_pool
        pooled = pool(sequences, lengths, divisor=recipe.topk_divisor)
        # A NaN or +Inf is among the k largest, so looking at the means is looking at everything.
        if not pooled.isfinite().all():
            _check_finite("tcam", tcam, lengths)
        if pooled.shape[1] == 0:
            return pooled > 0
        best = pooled.amax(dim=1, keepdim=True)
        if recipe.class_rule == "relative":
            # Never true where p <= 0, as the share is below 1.
            classes = pooled > recipe.class_threshold * best
        else:
            threshold = torch.full_like(best, recipe.class_threshold)
            if recipe.class_threshold_high is not None:
                threshold = torch.where(best > recipe.class_threshold_high, recipe.class_threshold_high, threshold)
            classes = pooled > threshold
        if recipe.max_classes is not None and recipe.max_classes < pooled.shape[1]:
            classes &= pooled > pooled.sort(dim=1, descending=True).values[:, recipe.max_classes, None]
        return classes

    def _above_floor(self, proposals: Proposals, batch: int, classes: int) -> Proposals:
        """The proposals that reach S_th."""
        share = self.recipe.score_floor
        if self.recipe.score_floor_scope == "class":
            group = proposals.recording * classes + proposals.label
            none = proposals.score.new_full((batch * classes,), -torch.inf)
            best = none.scatter_reduce(0, group, proposals.score, reduce="amax")[group]
            keep = proposals.score >= share * best
        else:
            # Starting from 0, a recording whose best score is not positive keeps nothing.
            none = proposals.score.new_zeros(batch)
            best = none.scatter_reduce(0, proposals.recording, proposals.score, reduce="amax")[proposals.recording]
            keep = proposals.score > share * best
        return Proposals(*(x[keep] for x in proposals))


def _floor_topk_pool(x: Tensor, lengths: Tensor | None, *, divisor: int) -> Tensor:
    """:func:`topk_pool` with k = max(1, floor(length / divisor))."""
    valid = valid_mask("Localizer", x, lengths)
    length = valid.sum(1, keepdim=True)
    k = (length // divisor).clamp(min=1)
    top = x.masked_fill(~valid[:, :, None], -torch.inf).sort(dim=1, descending=True).values
    counts = torch.arange(x.shape[1], device=x.device) < torch.minimum(k, length)
    return torch.where(counts[:, :, None], top, 0).sum(1) / k


def to_detections(
    proposals: Proposals,
    *,
    videos: Sequence[str],
    classes: Sequence[str],
    seconds_per_snippet: Sequence[float],
    first_snippet: Sequence[float] | None = None,
    durations: Sequence[float | None] | None = None,
) -> Detections:
    """Name the proposals' recordings and classes and put their times in seconds.

    Args:
        proposals: Segments in snippets; snippet t covers first_snippet + [t, t + 1) * seconds_per_snippet.
        videos: Name of each recording of the batch.
        classes: Name of each class.
        seconds_per_snippet: Of each recording.
        first_snippet: Second at which snippet 0 of each recording begins; None: 0.
        durations: Seconds of each recording, or None; a detection ends there at the latest.

    Raises:
        InputError: a proposal of a recording or class that has no name here, or a duration that is not positive.
    """
    for name, given in (
        ("seconds_per_snippet", seconds_per_snippet),
        ("first_snippet", first_snippet),
        ("durations", durations),
    ):
        check_kept("to_detections", name, given)
    seconds = np.asarray(seconds_per_snippet, np.float64)
    if seconds.shape != (len(videos),) or not ((seconds > 0) & np.isfinite(seconds)).all():
        raise InputError(f"seconds_per_snippet must be one positive number for each of the {len(videos)} videos")
    first = np.zeros(len(videos)) if first_snippet is None else np.asarray(first_snippet, np.float64)
    last = np.array([math.inf if d is None else d for d in durations or [None] * len(videos)], np.float64)
    if first.shape != seconds.shape or not np.isfinite(first).all() or last.shape != seconds.shape:
        raise InputError(f"first_snippet and durations must be one number for each of the {len(videos)} videos")
    video, label, start, end, score = (x.detach().cpu().numpy() for x in proposals)
    for name, index, size in (("recording", video, len(videos)), ("class", label, len(classes))):
        if len(index) and not 0 <= index.min() <= index.max() < size:
            raise InputError(f"a proposal has {name} {index.max()}, but only {size} names were given")
    begins = (first[video] + start * seconds[video]).clip(0)
    ends = first[video] + end * seconds[video]
    return Detections(
        videos=tuple(videos),
        classes=tuple(classes),
        video=video.astype(np.int64),
        label=label.astype(np.int64),
        start=begins,
        # One that begins past the end, by the few snippets that a length may be off, is left as it is.
        end=np.where(begins < last[video], ends.clip(0, last[video]), ends),
        score=score.astype(np.float64),
    )


def predict(model: nn.Module, features: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
    """TCAM and bottom-up attention of one recording, in evaluation mode and without gradient.

    On a CPU, in as many threads as so many snippets are worth (:mod:`d2net.threads`).

    Args:
        model: A :class:`d2net.model.D2Net`, or a module with a tensor ``x_ref`` (D,) that is called as it is: with
            features (1, T, W) and lengths (1,), for ``tcam`` (1, T, C) and ``embeddings`` (1, T, D).
        features: (T, W).

    Returns:
        The TCAM (T, C) and lambda' (T,) of Eq. 8, on the device of x_ref.

    Raises:
        InputError: a model without x_ref.
    """
    x_ref = _x_ref_of(model)
    # An array may be read-only, which tensors cannot be: copied.
    x = (features if isinstance(features, Tensor) else torch.tensor(features)).to(x_ref.device, torch.float32)
    lengths = torch.tensor([len(x)], device=x.device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), computing(threads_for(multiply_adds(model, len(x)))):
            out = model(x[None], lengths)
            return out.tcam[0], bottom_up_attention(out.embeddings, x_ref)[0]
    finally:
        model.train(training)


def _x_ref_of(model: nn.Module) -> Tensor:
    x_ref = getattr(model, "x_ref", None)
    if not isinstance(x_ref, Tensor):
        raise InputError(
            f"{type(model).__name__} has no x_ref, the mean background embedding (D,) that Eq. 8 compares with; give "
            "it one, model.register_buffer('x_ref', loss.reference), or call a Localizer on its TCAMs, which needs none"
        )
    return x_ref


def classes_of(model: nn.Module, dataset: Dataset) -> tuple[str, ...]:
    """Names of a network's outputs: its own, or those of the dataset where it has none (``model.classes``)."""
    return getattr(model, "classes", None) or dataset.classes


def localize(
    model: nn.Module,
    dataset: Dataset,
    recipe: LocalizationRecipe | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Detections:
    """Detections of every recording of a dataset (Sec. 3.3), one recording at a time at its full length.

    Args:
        model: See :func:`predict`. It computes on the device that it is on.
        dataset: Its recordings, in order, are the videos of the result; it needs no labels. The classes of the result
            are the model's own (``model.classes``), in the order of its outputs; the dataset's where it has none.
        recipe: The settings of Sec. 3.3; None: those that the model was trained with, ``model.recipe.localization``.
        progress: Called with (recordings done, all recordings) after each.

    Raises:
        InputError: a model without x_ref or settings, or of other stream widths than the dataset, features that cannot
            be used, or activations that are NaN or Inf.
    """
    if recipe is None:
        trained = getattr(model, "recipe", None)
        if not isinstance(trained, Recipe):
            raise InputError(
                f"{type(model).__name__} does not say how to localize, as a trained D2Net does; give recipe, such as "
                "load_recipe('thumos14-paper').localization"
            )
        recipe = trained.localization
    widths = getattr(model, "stream_widths", dataset.stream_widths)
    if widths != dataset.stream_widths:
        raise InputError(
            f"the network takes streams of widths {widths}, dataset '{dataset.name}' has {dataset.stream_widths}; give "
            "features of the same extractor"
        )
    x_ref = _x_ref_of(model)
    if recipe.attention and not x_ref.any():
        warnings.warn(
            "x_ref of the network is 0, as before training: lambda' (Eq. 8) is 0.5 everywhere and tells no action from "
            "background; train with loss.reference = model.x_ref",
            stacklevel=2,
        )
    localizer = Localizer(recipe)
    found = []
    for index, recording in enumerate(dataset.recordings):
        tcam, attention = predict(model, dataset.features(index))
        try:
            proposals = localizer(tcam, attention)
        except InputError as error:
            raise InputError(f"{recording.source}: '{recording.name}': {error}") from error
        found.append(proposals._replace(recording=torch.full_like(proposals.recording, index)))
        if progress is not None:
            progress(index + 1, len(dataset))
    if not found:
        none = torch.empty(0, dtype=torch.int64)
        found = [Proposals(none, none, none, none, torch.empty(0))]
    return to_detections(
        Proposals(*(torch.cat(column) for column in zip(*found, strict=True))),
        videos=[r.name for r in dataset.recordings],
        classes=classes_of(model, dataset),
        seconds_per_snippet=[r.seconds_per_snippet for r in dataset.recordings],
        first_snippet=[r.first_snippet for r in dataset.recordings],
        durations=[r.duration for r in dataset.recordings],
    )


def _check_finite(name: str, x: Tensor, lengths: Tensor | None) -> None:
    """Raise InputError for NaN or Inf in ``x`` (B, T) or (B, T, C) before a recording's end."""
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
