"""Detections and annotations as flat arrays, and the ActivityNet JSON they are exchanged in."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d2net.errors import InputError


@dataclass(frozen=True)
class Segments:
    """Labelled time intervals of many recordings, one row each.

    Attributes:
        videos: Names of all recordings, including those without any segment.
        classes: Names of the action classes.
        video: (N,) int64, index into ``videos``.
        label: (N,) int64, index into ``classes``.
        start, end: (N,) float64, seconds; ``end`` is exclusive.
    """

    videos: tuple[str, ...]
    classes: tuple[str, ...]
    video: np.ndarray
    label: np.ndarray
    start: np.ndarray
    end: np.ndarray

    def __len__(self) -> int:
        return len(self.start)


@dataclass(frozen=True)
class Detections(Segments):
    """Scored segments: what :func:`d2net.evaluation.evaluate` judges. ``score`` is (N,) float64."""

    score: np.ndarray


@dataclass(frozen=True)
class Annotations(Segments):
    """Ground truth.

    Attributes:
        ambiguous: (M, 3) float64 rows (video index, start s, end s) of doubtful segments, which are of no class: the
            ``wtalc`` protocol drops a detection that touches one.
        annotated: (V,) bool, whether somebody looked for segments in a video; None: in those that have some.
    """

    ambiguous: np.ndarray
    annotated: np.ndarray | None = None


def read_detections(path: str | os.PathLike[str], annotations: Segments | None = None) -> Detections:
    """Detections from an ActivityNet JSON, ``{"results": {video: [{"label", "score", "segment": [s, e]}]}}``.

    Args:
        path: The file. Times are seconds.
        annotations: Its videos and classes come first, in its order; names that it lacks follow, sorted
            (:func:`d2net.evaluation.evaluate` reports those). Without it all names are sorted.

    Raises:
        InputError: missing or damaged file, missing key, a time or score that is no finite number, or a segment
            that ends before it starts.
    """
    path = Path(path)
    results = _mapping(_read_json(path), "results", f"{path}")
    rows: list[tuple[str, str, float, float, float]] = []
    for name, entries in results.items():
        for i, entry in enumerate(_entries(entries, f"{path}: video '{name}'")):
            where = f"{path}: video '{name}', detection {i}"
            label, start, end = _labelled_segment(entry, where)
            if "score" not in entry:
                raise InputError(f"{where}: no 'score'; give every detection one number")
            rows.append((name, label, start, end, _number(entry["score"], f"{where}: score")))
    videos = _names(annotations.videos if annotations is not None else (), results)
    classes = _names(annotations.classes if annotations is not None else (), (r[1] for r in rows))
    return Detections(
        videos=videos,
        classes=classes,
        score=np.array([r[4] for r in rows], np.float64),
        **_columns(videos, classes, rows),
    )


def write_detections(path: str | os.PathLike[str], detections: Detections, features: str | None = None) -> None:
    """Write detections as ActivityNet JSON. Videos without a detection get an empty list.

    The file appears whole or not at all: it is written beside its place and then moved there.

    Args:
        features: What features the detections are from; kept under ``external_data``, where ActivityNet's rules ask
            for it, and read by :func:`read_features`.

    Raises:
        InputError: the file cannot be written, or a time or score is not finite.
    """
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in detections.videos}
    columns = (detections.video, detections.label, detections.start, detections.end, detections.score)
    for video, label, start, end, score in zip(*(c.tolist() for c in columns), strict=True):
        name = detections.videos[video]
        if not (math.isfinite(start) and math.isfinite(end) and math.isfinite(score)):
            raise InputError(
                f"{path}: a detection of '{name}' has start {start}, end {end}, score {score}, which JSON cannot "
                "hold; drop such detections before writing"
            )
        results[name].append({"label": detections.classes[label], "score": score, "segment": [start, end]})
    external = {"used": True, "details": features} if features else {}
    _write_whole(Path(path), json.dumps({"version": "VERSION 1.3", "results": results, "external_data": external}))


def read_features(path: str | os.PathLike[str]) -> str | None:
    """What an ActivityNet JSON says of the features its detections are from; None where it says nothing."""
    data = _read_json(Path(path))
    external = data.get("external_data") if isinstance(data, dict) else None
    details = external.get("details") if isinstance(external, dict) else None
    return details if isinstance(details, str) and details.strip() else None


def _names(first: Iterable[str], others: Iterable[str]) -> tuple[str, ...]:
    """``first`` in its order, then what else is in ``others``, sorted."""
    return tuple(dict.fromkeys([*first, *sorted(set(others))]))


def _columns(videos: tuple[str, ...], classes: tuple[str, ...], rows: list[Any]) -> dict[str, np.ndarray]:
    """The arrays of :class:`Segments` from rows (video, class, start, end, …)."""
    video = {name: i for i, name in enumerate(videos)}
    label = {name: i for i, name in enumerate(classes)}
    return {
        "video": np.array([video[r[0]] for r in rows], np.int64),
        "label": np.array([label[r[1]] for r in rows], np.int64),
        "start": np.array([r[2] for r in rows], np.float64),
        "end": np.array([r[3] for r in rows], np.float64),
    }


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; check the path") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
        raise InputError(f"{path}: not valid JSON ({error}); is it truncated? Write or download it again") from error


def _mapping(data: Any, key: str, where: str) -> dict[str, Any]:
    if not isinstance(data, dict) or not isinstance(data.get(key), dict):
        raise InputError(f"{where}: no object under the key '{key}'; expected {{\"{key}\": {{VIDEO: …}}}}")
    value: dict[str, Any] = data[key]
    return value


def _entries(data: Any, where: str) -> list[Any]:
    if not isinstance(data, list):
        raise InputError(f"{where}: expected a list of segments, got {type(data).__name__}")
    return data


def _labelled_segment(entry: Any, where: str) -> tuple[str, float, float]:
    if not isinstance(entry, dict) or not isinstance(entry.get("label"), str) or "segment" not in entry:
        raise InputError(f"{where}: expected an object with 'label' (a string) and 'segment' ([start, end])")
    return entry["label"], *_segment(entry["segment"], where)


def _segment(pair: Any, where: str) -> tuple[float, float]:
    if not isinstance(pair, (list, tuple, np.ndarray)) or len(pair) != 2:
        raise InputError(f"{where}: segment {pair!r} is not a pair [start, end] in seconds")
    start, end = _number(pair[0], f"{where}: start"), _number(pair[1], f"{where}: end")
    if end < start:
        raise InputError(f"{where}: segment ends at {end:g} before it starts at {start:g}; swap or drop it")
    return start, end


def _number(value: Any, where: str) -> float:
    """A finite number; numbers in strings are common in THUMOS14 files."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{where} is {value!r}, not a finite number; mend or drop the segment")
    return number


def _write_whole(path: Path, text: str) -> None:
    """Write through a temporary file in the same folder, so that no reader ever sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: not an ordinary file; give the path of a file to write")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); make space and check that its folder exists and can be "
            "written, or give another path"
        ) from error
    finally:
        with suppress(OSError):  # gone after a successful move
            temporary.unlink()
