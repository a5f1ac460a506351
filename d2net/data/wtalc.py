"""Layout 1: W-TALC, 3C-Net, D2-Net, CO2-Net: one pickled array of features and a folder of pickled annotations."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from d2net.data.dataset import Dataset, Recording
from d2net.data.files import check_features, halves
from d2net.data.timeline import choose
from d2net.errors import InputError

SUFFIX = "-I3D-JOINTFeatures.npy"
SECONDS_PER_SNIPPET = 16 / 25


def open_wtalc(
    features: Path,
    *,
    trust_pickle: bool = False,
    annotations: Path | None = None,
    subsets: Sequence[str] | None = None,
) -> Dataset:
    """Opens layout 1. The format has no other way than to load all features into memory.

    Labels are those of ``labels_all.npy``, which this family of methods trains on. In the published THUMOS14 files they
    differ from the classes of the segments for 28 of 412 videos (8 of them for training).

    Args:
        features: ``NAME-I3D-JOINTFeatures.npy``, an object array of (T, width) arrays.
        trust_pickle: These files are pickles, which can run any code when loaded; say True only if you
            trust whoever made them.
        annotations: The folder of annotations; ``NAME-Annotations`` beside the features by default.
        subsets: Keep only these.

    Raises:
        InputError: not trusted, a missing or broken file, files of different lengths.
    """
    if not trust_pickle:
        raise InputError(
            f"{features}: is a Python pickle, which can run any code when loaded; if you trust its maker, add "
            "--trust-pickle, or turn it once into plain files with: d2net convert --trust-pickle"
        )
    name = features.name.removesuffix(SUFFIX)
    folder = annotations or features.parent / f"{name}-Annotations"
    names = [_text(v) for v in _load(folder / "videoname.npy").reshape(-1)]

    def column(path: Path) -> np.ndarray:
        array = _load(path)
        if array.shape[:1] != (len(names),):
            raise InputError(
                f"{path}: has shape {array.shape} but videoname.npy has {len(names)} rows; "
                "take both from the same release"
            )
        return array

    subset = [_text(v) for v in column(folder / "subset.npy")]
    labels = [[_text(v) for v in row] for row in column(folder / "labels.npy")]
    labels_all = [tuple(_text(v) for v in row) for row in column(folder / "labels_all.npy")]
    segments = column(folder / "segments.npy")
    duration = column(folder / "duration.npy").reshape(len(names), -1)[:, 0]
    classes = tuple(_text(v) for v in _load(folder / "classlist.npy"))
    arrays = column(features)

    chosen = choose(subsets, subset, folder)
    width: int | None = None
    recordings = []
    for i, video in enumerate(names):
        if subset[i] not in chosen:
            continue
        source = f"{features} [{i}] '{video}'"
        array = np.asarray(arrays[i])
        if array.dtype.kind not in "fiu":
            raise InputError(f"{source}: has dtype {array.dtype}; features are real numbers, save them as float32")
        width = check_features(array, source, width).shape[1]
        try:
            rows = tuple((float(s), float(e), c) for (s, e), c in zip(segments[i], labels[i], strict=True))
        except (TypeError, ValueError):
            raise InputError(
                f"{folder / 'segments.npy'}: segments of '{video}' are not one (start, end) for each of its "
                f"{len(labels[i])} labels in labels.npy; take both from the same release"
            ) from None
        recordings.append(
            Recording(
                name=video,
                subset=subset[i],
                labels=tuple(dict.fromkeys(labels_all[i])),
                segments=rows,
                seconds_per_snippet=SECONDS_PER_SNIPPET,
                source=source,
                read=partial(np.asarray, array),
                duration=float(duration[i]),
            )
        )
    assert width is not None  # choose() names only subsets that have a video
    return Dataset(name, classes, halves(width, str(features)), tuple(recordings))


def _load(path: Path) -> np.ndarray:
    """An array that may be pickled; latin1 is what turns Python 2's strings into text."""
    try:
        return np.load(path, allow_pickle=True, encoding="latin1")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; the W-TALC layout needs it, download the annotations") from None
    except (OSError, ValueError, EOFError, ImportError, AttributeError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path}: cannot be loaded, damaged perhaps ({reason}); download it again") from None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
