"""From temporal class activation maps to detections in seconds (Sec. 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from d2net.data.dataset import Dataset
from d2net.detections import Detections
from d2net.errors import InputError
from d2net.losses import bottom_up_attention
from d2net.ops.proposals import Proposals, extract_proposals
from d2net.ops.topk_pool import topk_pool
from d2net.recipes import LocalizationRecipe, Recipe, load_recipe


class Localizer:
    """Turns TCAMs into scored segments, for TCAMs of any model.

    Args:
        recipe: The settings of Sec. 3.3.

    Raises:
        InputError: a share in the recipe that is not one.
    """

    def __init__(self, recipe: LocalizationRecipe) -> None:
        for key in ("class_threshold", "score_floor"):
            value = getattr(recipe, key)
            if not 0 <= value < 1:
                raise InputError(f"localization.{key} is a share of the best and must lie in [0, 1), found {value}")
        self.recipe = recipe

    @staticmethod
    def from_recipe(name: str, **overrides: object) -> Localizer:
        """The localizer of a named recipe, with single settings of ``LocalizationRecipe`` replaced.

        Raises:
            InputError: unknown recipe or setting (the nearest is named), or a value of the wrong type.
        """
        table = load_recipe(name).to_dict()
        table["localization"].update(overrides)
        return Localizer(Recipe.from_dict(table, source=f"localizer of recipe {name}").localization)

    @torch.no_grad()
    def __call__(self, tcam: Tensor, attention: Tensor | None = None, lengths: Tensor | None = None) -> Proposals:
        """Localize the actions of a batch (or of one recording, without the batch dimension).

        Classes with p > ``class_threshold`` * max(p) are kept, p being the top-k pooled TCAM. Their
        activations, refined as r_c = lambda' T_c, give the proposals
        (:func:`d2net.ops.proposals.extract_proposals`); those with
        S > S_th = ``score_floor`` * (the recording's best S) stay. A recording without a positive p or a
        positive S has no detection.

        Args:
            tcam: (B, T, C) or (T, C) class activations.
            attention: (B, T) or (T,) bottom-up attention lambda' (Eq. 8); None, or ``attention: false`` in
                the recipe, leaves the TCAM as it is.
            lengths: (B,) valid snippets of each recording (None: all T). What lies past never matters.

        Returns:
            Proposals by recording, class and falling score, in snippets.

        Raises:
            InputError: wrong shapes, or NaN or Inf within a recording.
        """
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
        _check_finite("tcam", tcam, lengths)

        pooled = topk_pool(tcam, lengths, divisor=self.recipe.topk_divisor)
        best = pooled.amax(dim=1, keepdim=True) if pooled.shape[1] else pooled
        classes = pooled > self.recipe.class_threshold * best  # never true where p <= 0, as the share is below 1
        refined = tcam
        if attention is not None and self.recipe.attention:
            _check_finite("attention", attention, lengths)
            refined = tcam * attention[..., None]
        proposals = extract_proposals(
            refined,
            classes,
            lengths,
            thresholds=self.recipe.thresholds,
            min_length=self.recipe.min_length,
            inflation=self.recipe.inflation,
            nms_iou=self.recipe.nms_iou,
        )
        # Starting from 0, a recording whose best score is not positive keeps nothing.
        best_score = proposals.score.new_zeros(batch).scatter_reduce(
            0, proposals.recording, proposals.score, reduce="amax"
        )
        keep = proposals.score > self.recipe.score_floor * best_score[proposals.recording]
        return Proposals(*(x[keep] for x in proposals))


def to_detections(
    proposals: Proposals, *, videos: Sequence[str], classes: Sequence[str], seconds_per_snippet: Sequence[float]
) -> Detections:
    """Name the proposals' recordings and classes and put their times in seconds.

    Args:
        proposals: Segments in snippets; snippet t covers [t, t + 1) * seconds_per_snippet.
        videos: Name of each recording of the batch.
        classes: Name of each class.
        seconds_per_snippet: Of each recording.

    Raises:
        InputError: a proposal of a recording or class that has no name here, or a duration that is not positive.
    """
    seconds = np.asarray(seconds_per_snippet, np.float64)
    if seconds.shape != (len(videos),) or not ((seconds > 0) & np.isfinite(seconds)).all():
        raise InputError(f"seconds_per_snippet must be one positive number for each of the {len(videos)} videos")
    video, label, start, end, score = (x.detach().cpu().numpy() for x in proposals)
    for name, index, size in (("recording", video, len(videos)), ("class", label, len(classes))):
        if len(index) and not 0 <= index.min() <= index.max() < size:
            raise InputError(f"a proposal has {name} {index.max()}, but only {size} names were given")
    return Detections(
        videos=tuple(videos),
        classes=tuple(classes),
        video=video.astype(np.int64),
        label=label.astype(np.int64),
        start=start * seconds[video],
        end=end * seconds[video],
        score=score.astype(np.float64),
    )


def predict(model: nn.Module, reference: Tensor, features: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
    """TCAM and bottom-up attention of one recording, in evaluation mode and without gradient.

    Args:
        model: Called with features (1, T, W) and lengths (1,); returns ``tcam`` and ``embeddings``.
        reference: (D,) background reference x_ref, on the model's device.
        features: (T, W).

    Returns:
        The TCAM (T, C) and lambda' (T,) of Eq. 8, on the model's device.
    """
    x = torch.as_tensor(features).to(reference.device, torch.float32)
    lengths = torch.tensor([len(x)], device=x.device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            out = model(x[None], lengths)
            return out.tcam[0], bottom_up_attention(out.embeddings, reference)[0]
    finally:
        model.train(training)


def localize(
    model: nn.Module,
    reference: Tensor,
    dataset: Dataset,
    recipe: LocalizationRecipe,
    *,
    device: torch.device | str,
    progress: Callable[[int, int], None] | None = None,
) -> Detections:
    """Detections of every recording of a dataset (Sec. 3.3), one recording at a time at its full length.

    Args:
        model: See :func:`predict`; it is moved to ``device``.
        reference: (D,) background reference x_ref of Eq. 8.
        dataset: Its recordings, in order, are the videos of the result; it needs no labels.
        recipe: The settings of Sec. 3.3.
        device: Where to compute.
        progress: Called with (recordings done, all recordings) after each.

    Raises:
        InputError: features that cannot be used, or a model whose activations are NaN or Inf.
    """
    localizer = Localizer(recipe)
    model.to(device)
    reference = reference.to(device)
    found = []
    for index, recording in enumerate(dataset.recordings):
        tcam, attention = predict(model, reference, dataset.features(index))
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
        classes=dataset.classes,
        seconds_per_snippet=[r.seconds_per_snippet for r in dataset.recordings],
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
