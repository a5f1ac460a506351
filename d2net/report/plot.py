"""Timelines of a dataset's recordings, from checkpoints and files of detections (``d2net plot``)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from d2net.checkpoint import load_model
from d2net.data.dataset import Dataset, Recording
from d2net.data.timeline import is_ambiguous
from d2net.detections import Detections, read_detections
from d2net.errors import InputError
from d2net.files import one_component
from d2net.localization import classes_of, localize, predict
from d2net.recipes import Recipe
from d2net.report.timeline import MAX_CLASSES, TimelineRow, Track
from d2net.words import did_you_mean

__all__ = [
    "checkpoint_tracks",
    "choose_recordings",
    "detections_tracks",
    "find_frames",
    "find_recordings",
    "model_tracks",
    "timeline_rows",
]

PICTURED = 3  # recordings of a picture if none are named
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")


def choose_recordings(dataset: Dataset, count: int = PICTURED) -> Dataset:
    """Up to ``count`` recordings, each the first that shows the most classes not shown before.

    Depends on the annotations alone, so that the picture is not chosen by how well it looks.
    """
    chosen: list[int] = []
    seen: set[str] = set()

    def gain(index: int) -> tuple[int, int]:
        return len(set(dataset.recordings[index].labels) - seen), -index

    while len(chosen) < min(count, len(dataset)):
        best = max((i for i in range(len(dataset)) if i not in chosen), key=gain)
        chosen.append(best)
        seen |= set(dataset.recordings[best].labels)
    return replace(dataset, recordings=tuple(dataset.recordings[i] for i in chosen))


def find_recordings(dataset: Dataset, names: Sequence[str]) -> Dataset:
    """The recordings of these names, in that order. Raises InputError for a name that is not there."""
    there = {r.name: r for r in dataset.recordings}
    reasons = {x.name: x.why for x in dataset.left_out}
    for name in names:
        if name in reasons:
            raise InputError(f"recording '{name}' has no usable features: {reasons[name]}")
        if name not in there:
            hint = did_you_mean(name, there)
            raise InputError(
                f"dataset '{dataset.name}' has no recording '{name}'{hint} among the {len(there)} of subset "
                f"{', '.join(dataset.subsets) or '(none)'}; check the name, or give the subset it is in"
            )
    return replace(dataset, recordings=tuple(there[name] for name in dict.fromkeys(names)))


def default_label(path: Path) -> str:
    """What to call a checkpoint or a file of detections: its folder, where its own name is the usual one."""
    if path.is_dir():
        return path.resolve().name
    return path.absolute().parent.name if path.stem in ("checkpoint", "detections") else path.stem


def find_frames(folder: Path, name: str) -> list[Path]:
    """The images in ``folder/name``, by name (numbers as numbers: 2.jpg before 10.jpg).

    Raises:
        InputError: no such folder, no image in it, or a name that no folder can have.
    """
    place = folder / one_component(name, f"{folder}: frames of a recording")
    if not place.is_dir():
        raise InputError(
            f"{place}: no such folder; the frames of each recording pictured must lie in one of its name, as "
            f"{place / '000001.jpg'}"
        )
    found = [p for p in place.iterdir() if p.suffix.lower() in FRAME_SUFFIXES]
    if not found:
        raise InputError(f"{place}: holds no .jpg or .png; extract frames of the recording there")
    return sorted(found, key=lambda p: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", p.name)])


def checkpoint_tracks(path: Path, label: str, dataset: Dataset, device: str = "cpu") -> list[Track]:
    """What the model of a checkpoint finds in every recording of ``dataset``, with TCAM and attention.

    The classes are those of the checkpoint, whatever the dataset's.

    Raises:
        InputError: a checkpoint that cannot be used, or one of other stream widths than the dataset.
    """
    model = load_model(path, device)
    if model.stream_widths != dataset.stream_widths:
        raise InputError(
            f"{path} was trained on streams of widths {model.stream_widths}, dataset '{dataset.name}' has "
            f"{dataset.stream_widths}; give features of the same extractor"
        )
    return model_tracks(model, dataset, localize(model, dataset), label)


def model_tracks(model: nn.Module, dataset: Dataset, detections: Detections, label: str = "") -> list[Track]:
    """TCAM and attention, where its settings use it, of every recording, beside ``detections`` that it made before."""
    tracks = []
    recipe = getattr(model, "recipe", None)
    used = not isinstance(recipe, Recipe) or recipe.localization.attention
    for index, recording in enumerate(dataset.recordings):
        tcam, attention = predict(model, dataset.features(index))
        found = as_rows(detections, detections_of(detections, recording.name))
        scores, lambda_ = tcam.cpu().numpy(), attention.cpu().numpy() if used and attention is not None else None
        tracks.append(Track(label, found, scores, lambda_, classes_of(model, dataset)))
    return tracks


def detections_tracks(path: Path, label: str, dataset: Dataset) -> list[Track]:
    """The detections of a file in every recording of ``dataset``, of whatever classes.

    Raises:
        InputError: a file that cannot be read, or that names none of the recordings.

    Warns:
        UserWarning: a file that does not name some of the recordings.
    """
    detections = read_detections(path)
    names = [r.name for r in dataset.recordings]
    absent = [name for name in names if name not in detections.videos]
    if len(absent) == len(names):
        raise InputError(f"{path}: names none of the recordings pictured ({', '.join(names)}); choose others, --video")
    if absent:
        warnings.warn(f"{path}: does not name {', '.join(absent)}, so nothing of it is drawn there", stacklevel=2)
    found = [as_rows(detections, detections_of(detections, name)) for name in names]
    marks = sum(is_ambiguous(d[2]) for of in found for d in of)
    if marks:
        warnings.warn(f"{path}: {marks} detections are labelled ambiguous, which is no class: not drawn", stacklevel=2)
    return [Track(label, [d for d in of if not is_ambiguous(d[2])]) for of in found]


def timeline_rows(dataset: Dataset, tracks: Sequence[Sequence[Track]], frames: Path | None = None) -> list[TimelineRow]:
    """Every recording of ``dataset`` for :func:`d2net.report.timeline.draw_timeline`.

    The classes are those of all models, then those of the dataset and of the detections.

    Args:
        dataset: The recordings pictured.
        tracks: Of each model or file, one track per recording.
        frames: Folder with a folder of images for each recording, or None.

    Raises:
        InputError: a recording without frames, or a label of a recording that no model and no file knows, where there
            is a model.

    Warns:
        UserWarning: models or files of different classes.
    """
    classes = _check_classes(dataset, tracks)
    return [
        TimelineRow(
            name=_title(dataset, recording, classes),
            seconds_per_snippet=recording.seconds_per_snippet,
            classes=classes,
            ground_truth=recording.segments,
            tracks=[of[index] for of in tracks],
            duration=_duration(dataset, recording, index),
            frames=find_frames(frames, recording.name) if frames else (),
            first_snippet=recording.first_snippet,
        )
        for index, recording in enumerate(dataset.recordings)
    ]


def _check_classes(dataset: Dataset, tracks: Sequence[Sequence[Track]]) -> list[str]:
    """All classes of the picture in order. Warns or raises for classes that a model or the dataset does not know."""
    models = [(of[0].label, of[0].classes) for of in tracks if of[0].classes is not None]
    files = [(of[0].label, {d[2] for t in of for d in t.detections}) for of in tracks if of[0].classes is None]
    known = list(dict.fromkeys(c for _, classes in models for c in classes))
    in_files = sorted(set().union(*(found for _, found in files)))
    labels = {label: r for r in dataset.recordings for label in (*r.labels, *(s[2] for s in r.segments))}
    for label, recording in labels.items() if models else ():
        if label not in known and label not in in_files:
            names = " and ".join(f"'{name}'" for name, _ in models)
            raise InputError(
                f"{recording.source}: recording '{recording.name}' is labelled '{label}', a class that {names} "
                f"{'was' if len(models) == 1 else 'were'} not trained on; the classes there are {', '.join(known)}; "
                "correct the label, or give a checkpoint that was trained on it"
            )
    for name, classes in models:
        lacking = [c for c in dict.fromkeys([*known, *labels]) if c not in classes]
        if lacking:
            warnings.warn(f"'{name}' was not trained on {_some(lacking)} and is drawn without", stacklevel=3)
    for name, found in files:
        odd = sorted(found - {*known, *dataset.classes})
        if odd and (known or dataset.classes):
            warnings.warn(
                f"'{name}' has detections of {_some(odd)}, which neither the dataset nor a checkpoint has", stacklevel=3
            )
    return list(dict.fromkeys([*known, *(() if models else dataset.classes), *in_files]))


def _some(names: Sequence[str], most: int = MAX_CLASSES) -> str:
    """A list in words, cut where it is long."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _title(dataset: Dataset, recording: Recording, classes: Sequence[str]) -> str:
    labels = [c for c in classes if c in recording.labels]  # the order of the lanes
    title = recording.name + (f" ({_some(labels)})" if labels else "")
    return title if "simulated" not in dataset.name or "simulated" in title else f"{title}, simulated"


def _duration(dataset: Dataset, recording: Recording, index: int) -> float:
    if recording.duration:
        return recording.duration
    return recording.first_snippet + len(dataset.features(index)) * recording.seconds_per_snippet


def detections_of(detections: Detections, name: str) -> np.ndarray:
    """Indices of one recording's detections, by time, class and score: the same whatever the order of the file."""
    if name not in detections.videos:
        return np.zeros(0, np.int64)
    its = np.nonzero(detections.video == detections.videos.index(name))[0]
    names = np.array(detections.classes)[detections.label[its]]
    return its[np.lexsort((detections.score[its], names, detections.end[its], detections.start[its]))]


def as_rows(detections: Detections, which: np.ndarray) -> list[tuple[float, float, str, float]]:
    """(start s, end s, class, score) of the detections of these indices."""
    return [
        (
            float(detections.start[i]),
            float(detections.end[i]),
            detections.classes[detections.label[i]],
            float(detections.score[i]),
        )
        for i in which
    ]
