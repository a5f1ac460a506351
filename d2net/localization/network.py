"""Runs a network on a dataset and localizes: detections in seconds."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from d2net.data.dataset import Dataset, Recording
from d2net.detections import Detections
from d2net.distributed import ALONE, Ranks
from d2net.errors import InputError
from d2net.localization.gather import check_same_everywhere, concatenated, gathered
from d2net.localization.localizer import Localizer
from d2net.model import D2Net
from d2net.ops.bottom_up_attention import bottom_up_attention
from d2net.ops.checks import check_kept
from d2net.ops.proposals import Proposals
from d2net.recipes import LocalizationRecipe, Recipe
from d2net.shares import deal
from d2net.threads import WORK_PER_THREAD, computing, multiply_adds, threads_for

GROUP_ROWS = 8192  # at most, of recordings that run through a network together
PADDING = 4  # times as many snippets, at most, that their activations have when they are padded


def predict(model: nn.Module, features: np.ndarray | Tensor) -> tuple[Tensor, Tensor | None]:
    """TCAM and bottom-up attention of one recording, in evaluation mode and without gradient.

    On a CPU the number of threads depends on the number of snippets (:mod:`d2net.threads`).

    Args:
        model: A :class:`d2net.model.D2Net`, or any module that takes features (1, T, W) and lengths (1,) and returns
            ``tcam`` (1, T, C) as an attribute; where it has a tensor ``x_ref`` (D,), ``embeddings`` (1, T, D) too.
        features: (T, W).

    Returns:
        The TCAM (T, C) and lambda' (T,) of Eq. 8, on the device of the model; None for lambda' where it has no x_ref.
    """
    x_ref = _x_ref_of(model)
    tensors = (t for t in (x_ref, *model.parameters(), *model.buffers()) if t is not None)
    device = next((t.device for t in tensors), None)
    # torch.tensor copies an array: it may be read-only, which a tensor cannot be.
    x = (features if isinstance(features, Tensor) else torch.tensor(features)).to(device, torch.float32)
    lengths = torch.tensor([len(x)], device=x.device)
    with _evaluating(model, len(x)):
        out = model(x[None], lengths)
        return out.tcam[0], None if x_ref is None else bottom_up_attention(out.embeddings, x_ref)[0]


@contextmanager
def _evaluating(model: nn.Module, rows: int) -> Iterator[None]:
    """In evaluation mode and without gradient, in as many threads as ``rows`` snippets are worth."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), computing(threads_for(multiply_adds(model, rows))):
            yield
    finally:
        model.train(training)


def _x_ref_of(model: nn.Module) -> Tensor | None:
    x_ref = getattr(model, "x_ref", None)
    return x_ref if isinstance(x_ref, Tensor) else None


def classes_of(model: nn.Module, dataset: Dataset) -> tuple[str, ...]:
    """Names of a network's outputs: ``model.classes``, or the classes of the dataset where it has none.

    Args:
        model: The network.
        dataset: What it is run on.
    """
    return getattr(model, "classes", None) or dataset.classes


def localize(
    model: nn.Module,
    dataset: Dataset,
    recipe: LocalizationRecipe | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> Detections:
    """Detections of every recording of a dataset (Sec. 3.3), each at its full length.

    Short recordings run through a :class:`d2net.model.D2Net` together, packed into up to 8,192 rows. On a CPU those of
    a large network do not: there each is enough work to run alone.

    Of several ranks each takes a share of about as many snippets, and all get the result. What runs together does not
    depend on the number of ranks, so on CPUs, in the same number of threads, the result has the bits of one process.

    Args:
        model: See :func:`predict`. It runs on its own device.
        dataset: Its recordings, in order, become ``videos`` of the result; it needs no labels. The classes of the
            result are those of the model, in the order of its outputs (:func:`classes_of`). A recording whose
            ``snippets`` is None is read twice, first for its length.
        recipe: The settings of Sec. 3.3; None: those that the model was trained with, ``model.recipe.localization``.
        progress: Called with (recordings done, all recordings) for each, after those that it ran together with; both
            are those of this rank.
        ranks: The processes that localize together; all must call this with the same arguments.

    Raises:
        InputError: a model without settings, without the x_ref that ``recipe.attention`` needs, or of other stream
            widths than the dataset, features that cannot be used, or activations that are NaN or Inf; another model,
            dataset or recipe on another rank.
    """
    trained = getattr(model, "recipe", None)
    if recipe is None:
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
    if recipe.attention and x_ref is None:
        raise InputError(
            f"{type(model).__name__} has no x_ref, the mean background embedding (D,) that Eq. 8 compares with; give "
            "it one, model.register_buffer('x_ref', loss.reference), or localize without it: attention=False in recipe"
        )
    # A network trained by d2net has x_ref = 0 only where no snippet was background, so it needs no warning.
    if recipe.attention and trained is None and x_ref is not None and not x_ref.any():
        warnings.warn(
            "x_ref of the network is 0, as before training: lambda' (Eq. 8) is 0.5 everywhere and tells no action from "
            "background; train with loss.reference = model.x_ref",
            stacklevel=2,
        )
    if ranks.size > 1:
        check_same_everywhere(ranks, model, dataset, recipe)
    localizer = Localizer(recipe)
    lengths = _lengths(dataset, ranks)
    groups = _groups(model, lengths)
    mine = deal([sum(lengths[i] for i in group) for group in groups], ranks.size)[ranks.rank]
    found: list[Proposals] = []
    done, number = 0, sum(len(groups[i]) for i in mine)
    for i in mine:
        group = groups[i]
        features = [dataset.features(index) for index in group]
        recordings = dataset.recordings[group.start : group.stop]
        if isinstance(model, D2Net) and len(group) > 1:
            proposals = _propose_together(localizer, recordings, model, features)
        else:
            proposals = propose(localizer, recordings[0], *predict(model, features[0]))
        del features  # before the next are read
        found.append(proposals._replace(recording=proposals.recording + group.start))
        for _ in group:
            done += 1
            if progress is not None:
                progress(done, number)
    return _in_seconds(gathered(found, ranks), dataset, classes_of(model, dataset))


def _lengths(dataset: Dataset, ranks: Ranks) -> list[int]:
    """Snippets of each recording. Those of which only reading tells are shared over the ranks."""
    lengths = [recording.snippets for recording in dataset.recordings]
    unknown = [i for i, length in enumerate(lengths) if length is None]
    mine = {i: len(dataset.features(i)) for i in (unknown[k] for k in ranks.share(len(unknown)))}
    for told in ranks.from_each(json.dumps(list(mine.items())).encode()) if unknown else []:
        for i, length in json.loads(told):
            lengths[i] = length
    return [length for length in lengths if length is not None]


def _groups(model: nn.Module, lengths: Sequence[int]) -> list[range]:
    """Which recordings run together, in order: one, or several that fit. ``lengths``: their snippets."""
    most = 0
    if type(model) is D2Net:  # the forward of another may not take packed recordings
        most = GROUP_ROWS
        if model.x_ref.device.type == "cpu":
            most = min(most, WORK_PER_THREAD // multiply_adds(model, 1))  # so much work hides what a call costs
    groups: list[range] = []
    first = rows = longest = 0
    for index, length in enumerate(lengths):
        padded = (index - first + 1) * max(longest, length)  # the localizer pads
        if index > first and (rows + length > most or padded > PADDING * most):
            groups.append(range(first, index))
            first, rows, longest = index, 0, 0
        rows, longest = rows + length, max(longest, length)
    return [*groups, range(first, len(lengths))] if lengths else []


def _propose_together(
    localizer: Localizer, recordings: Sequence[Recording], model: D2Net, features: Sequence[np.ndarray]
) -> Proposals:
    """:func:`propose` of several recordings, packed, from their features (T, W)."""
    device, ends = model.x_ref.device, np.cumsum([0, *(len(x) for x in features)])
    x, offsets = torch.from_numpy(np.concatenate(features)).to(device), torch.from_numpy(ends).to(device)
    with _evaluating(model, len(x)):
        out = model(x, offsets=offsets)
        attention = bottom_up_attention(out.embeddings[None], model.x_ref)[0]
    try:
        return localizer(out.tcam, attention, offsets=offsets)
    except InputError:
        for recording, first, end in zip(recordings, ends, ends[1:], strict=False):
            propose(localizer, recording, out.tcam[first:end], attention[first:end])  # names the recording
        raise


def propose(localizer: Localizer, recording: Recording, tcam: Tensor, attention: Tensor | None) -> Proposals:
    """Proposals of one recording, in snippets, from what :func:`predict` gives.

    Raises:
        InputError: activations that are NaN or Inf.
    """
    try:
        return localizer(tcam, attention)
    except InputError as error:
        raise InputError(f"{recording.source}: '{recording.name}': {error}") from error


def of_dataset(found: Sequence[Proposals], dataset: Dataset, classes: Sequence[str]) -> Detections:
    """The proposals of each recording of a dataset, in its order, as detections in seconds."""
    numbered = [p._replace(recording=torch.full_like(p.recording, i)) for i, p in enumerate(found)]
    return _in_seconds(numbered, dataset, classes)


def _in_seconds(found: Sequence[Proposals], dataset: Dataset, classes: Sequence[str]) -> Detections:
    """Proposals by the number of their recording in a dataset, as detections in seconds."""
    return to_detections(
        concatenated(found),
        videos=[r.name for r in dataset.recordings],
        classes=classes,
        seconds_per_snippet=[r.seconds_per_snippet for r in dataset.recordings],
        first_snippet=[r.first_snippet for r in dataset.recordings],
        durations=[r.duration for r in dataset.recordings],
    )


def to_detections(
    proposals: Proposals,
    *,
    videos: Sequence[str],
    classes: Sequence[str],
    seconds_per_snippet: Sequence[float],
    first_snippet: Sequence[float] | None = None,
    durations: Sequence[float | None] | None = None,
) -> Detections:
    """Proposals with the names of their recordings and classes, and times in seconds.

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
        raise InputError(f"seconds_per_snippet must be one positive number for each of the {len(videos)} recordings")
    first = np.zeros(len(videos)) if first_snippet is None else np.asarray(first_snippet, np.float64)
    last = np.array([math.inf if d is None else d for d in durations or [None] * len(videos)], np.float64)
    if first.shape != seconds.shape or not np.isfinite(first).all() or last.shape != seconds.shape:
        raise InputError(f"first_snippet and durations must be one number for each of the {len(videos)} recordings")
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
        # The length may be off by a few snippets: a segment that begins past the end is not cut.
        end=np.where(begins < last[video], ends.clip(0, last[video]), ends),
        score=score.astype(np.float64),
    )
