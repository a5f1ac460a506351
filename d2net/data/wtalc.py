"""Layout 1: W-TALC, 3C-Net, D2-Net, CO2-Net: one pickled array of features and a folder of pickled annotations."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from d2net.data.catalog import Catalog, Listing
from d2net.data.containers import FeatureArray, feature_array
from d2net.data.locate import JOINT, MissingFeatures
from d2net.data.pickled import load_pickled
from d2net.data.timeline import AMBIGUOUS_LIST, Entry, is_ambiguous, read_ambiguous, segment
from d2net.data.times import Times
from d2net.errors import InputError
from d2net.reading import check_ordinary, missing, seconds
from d2net.words import NAME, escaped, quoted, reason

CONVENTION = Times(fps=25, stride=16)  # how these features are extracted


def list_wtalc(features: Path, *, trust_pickle: bool = False, annotations: Path | None = None) -> Catalog:
    """Layout 1. All features are loaded into memory, as the format allows nothing else.

    Args:
        features: ``NAME-I3D-JOINTFeatures.npy``, an object array of (T, width) arrays.
        trust_pickle: Whether to read these files, which are pickles. Only arrays are read (:mod:`d2net.data.pickled`);
            give True only for a source that you trust.
        annotations: The folder of annotations; ``NAME-Annotations`` beside the features by default.

    Raises:
        InputError: not trusted, a missing or broken file, files of different lengths.
    """
    if not trust_pickle:
        _refuse(features)
    name = features.name.removesuffix(JOINT)
    folder = annotations or features.parent / f"{name}-Annotations"
    catalog = list_wtalc_annotations(folder, trust_pickle=True)
    if not (folder / "labels_all.npy").exists():  # enough for an evaluation, not for training
        raise InputError(
            f"{folder / 'labels_all.npy'}: no such file; the W-TALC layout needs it, download the annotations"
        )
    arrays = functools.cache(lambda: _load(features, len(catalog.listings)))  # when the first of them is wanted
    return replace(
        catalog,
        name=name,
        source=features,
        listings=tuple(
            replace(each, open=partial(_open, arrays, i, f"{features} [{i}] '{each.name}'"))
            for i, each in enumerate(catalog.listings)
        ),
        divide=_halves,
    )


def list_wtalc_annotations(folder: Path, *, trust_pickle: bool = False) -> Catalog:
    """The annotations of layout 1 without features, which are enough for an evaluation.

    Labels are those of ``labels_all.npy``, which this family of methods trains on (without it, of ``labels.npy``). In
    the published THUMOS14 files they differ from the classes of the segments for 28 of 412 videos (8 of them for
    training). Segments are those of ``segments.npy`` and ``labels.npy``; those of subset ``test`` are those of
    ``test_gt_segments.npy`` where that file exists (per class, rows of video number, start and end as fractions of the
    duration), which is the ground truth of the published evaluator.

    Raises:
        InputError: not trusted, a missing or broken file, files of different lengths.
    """
    if not trust_pickle:
        _refuse(folder)
    names = [_text(v) for v in _load(folder / "videoname.npy").reshape(-1)]
    if not names:
        raise InputError(f"{folder / 'videoname.npy'}: names no video; download it again")
    if twice := [n for n, count in Counter(names).items() if count > 1]:
        raise InputError(f"{folder / 'videoname.npy'}: names '{twice[0]}' twice; keep one row for each video")

    def column(file: str) -> np.ndarray:
        return _load(folder / file, len(names))

    subsets = [_text(v) for v in column("subset.npy")]
    listed_classes = tuple(map(_text, _load(folder / "classlist.npy")))
    classes = tuple(c for c in listed_classes if not is_ambiguous(c))
    durations = [
        _duration(row[0] if row else None, f"{folder / 'duration.npy'}: video '{name}'")
        for name, row in zip(names, column("duration.npy").reshape(len(names), -1)[:, :1].tolist(), strict=True)
    ]
    segments, labels = column("segments.npy"), column("labels.npy")
    labels_all = column("labels_all.npy") if (folder / "labels_all.npy").exists() else labels
    official = _test_segments(folder, names, subsets, durations, listed_classes)
    doubtful = read_ambiguous(folder / AMBIGUOUS_LIST)
    listings = []
    for i, name in enumerate(names):
        rows = _rows(folder, name, segments[i], labels[i], classes)
        named = _each(labels_all[i], f"{folder}: labels of video '{name}'")
        judged = rows if official is None or subsets[i] != "test" else official.get(name, [])
        truth = tuple(r for r in judged if not is_ambiguous(r[2]))
        marks = [(start, end) for start, end, label in judged if is_ambiguous(label)]
        entry = Entry(
            subset=subsets[i],
            labels=tuple(c for c in dict.fromkeys(map(_text, named)) if not is_ambiguous(c)),
            segments=truth,
            ambiguous=tuple(dict.fromkeys((*marks, *doubtful.get(name, ())))),
            duration=durations[i],
            withdrawn=len(rows) > 0 and not judged,
        )
        listings.append(Listing(name, entry, partial(_no_features, folder, name)))
    return Catalog(name=folder.name, source=folder, classes=classes, listings=tuple(listings), convention=CONVENTION)


def _rows(folder: Path, name: str, segments: Any, labels: Any, classes: tuple[str, ...]) -> tuple[tuple, ...]:
    where = f"{folder / 'segments.npy'}: video '{name}'"
    segments, labels = _each(segments, where), _each(labels, f"{folder / 'labels.npy'}: video '{name}'")
    if len(segments) != len(labels):
        raise InputError(
            f"{where} has {len(segments)} segments but {len(labels)} labels in labels.npy; take both files from the "
            "same download"
        )
    rows = []
    for i, (pair, label) in enumerate(zip(segments, map(_text, labels), strict=True)):
        if label not in classes and not is_ambiguous(label):
            raise InputError(f"{where}, segment {i}: label '{label}' is not in classlist.npy; add it there")
        try:
            rows.append((*segment(pair), label))
        except InputError as error:
            raise InputError(f"{where}, segment {i}: {error}; take it from the same download") from None
    return tuple(rows)


def _test_segments(
    folder: Path, names: list[str], subsets: list[str], durations: list[float], classes: tuple[str, ...]
) -> dict[str, list[tuple[float, float, str]]] | None:
    """Segments of the test videos by ``test_gt_segments.npy``, in its order; None without that file."""
    path = folder / "test_gt_segments.npy"
    if not path.exists():
        return None
    tests = [i for i, subset in enumerate(subsets) if subset == "test"]
    by_number = {names[i].rsplit("_", 1)[-1]: i for i in tests}
    if len(by_number) < len(tests):
        raise InputError(
            f"{path}: names videos by the number that they end in, which two of the test videos share; rename"
        )
    found: dict[str, list[tuple[float, float, str]]] = {}
    for label, rows in zip(classes, _load(path, len(classes)), strict=True):
        of_class = f"{path}: class '{escaped(label, NAME)}'"
        for row in _each(rows, of_class):
            row = _each(row, of_class)
            if len(row) != 3:
                raise InputError(f"{of_class}: {quoted(row)} is not a video number, a start and an end; download it")
            ending, *fractions = row
            where = f"{of_class}, video number '{_text(ending)}'"
            if _text(ending) not in by_number:
                raise InputError(f"{where}: no such test video in videoname.npy; take both from the same download")
            i = by_number[_text(ending)]
            try:
                start, end = segment(fractions)
                if end > 1.01:
                    raise InputError(f"[{start:g}, {end:g}] are no fractions of its duration")
            except InputError as error:
                raise InputError(f"{where}: {error}; take it from the same download") from None
            found.setdefault(names[i], []).append((start * durations[i], end * durations[i], label))
    return found


def _open(arrays: Callable[[], np.ndarray], index: int, source: str) -> tuple[FeatureArray, ...]:
    try:
        array = np.asarray(arrays()[index])
    except ValueError as error:  # rows of different lengths
        raise InputError(f"{source}: is no array ({reason(error)}); extract its features again") from None
    return (feature_array(array, source),)


def _duration(value: Any, where: str) -> float:
    try:
        found = seconds(value, "duration")
        if found > 0:
            return found
    except InputError:
        pass
    raise InputError(f"{where} lasts {quoted(value)} s; give its length in seconds")


def _no_features(folder: Path, name: str) -> NoReturn:
    raise MissingFeatures(
        f"{folder}: holds annotations alone, no features of '{name}'; give the folder of the features"
    )


def _halves(width: int, source: str) -> tuple[int, ...]:
    """Joint RGB + flow features."""
    if width % 2:
        raise InputError(
            f"{source}: width {width} is odd; joint features are two streams (RGB, flow) of equal width, for others "
            "give their widths with --streams"
        )
    return width // 2, width // 2


def _refuse(path: Path) -> NoReturn:
    raise InputError(
        f"{path}: is a Python pickle (or a folder of them), of which d2net reads arrays alone; if you trust its "
        "maker, add --trust-pickle, or turn it once into plain files with: d2net convert --trust-pickle"
    )


def _load(path: Path, length: int | None = None) -> np.ndarray:
    """An array that may be pickled, of a file that the user trusts; latin1 turns Python 2's strings into text."""
    if not path.exists():
        raise InputError(f"{path}: {missing(path)}; the W-TALC layout needs it, download the annotations")
    check_ordinary(path)
    try:
        array = load_pickled(path)
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(f"{path}: cannot be loaded, damaged perhaps ({reason(error)}); download it again") from None
    if not isinstance(array, np.ndarray) or array.ndim == 0 or length not in (None, len(array)):
        raise InputError(
            f"{path}: has shape {np.shape(array)}, expected {'an array' if length is None else f'{length} entries'}; "
            "take all files of the folder from the same release"
        )
    return array


def _text(value: Any) -> str:
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if isinstance(value, str) else quoted(value)


def _each(value: Any, where: str) -> list[Any]:
    """The entries of a list or array. Raises InputError for anything else."""
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{where} is {quoted(value)}, expected a list; take it from the same download")
    return list(value)
