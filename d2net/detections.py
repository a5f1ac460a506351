"""Detections and annotations as flat arrays, and the files (ActivityNet JSON, CSV) they are exchanged in."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from d2net.errors import InputError
from d2net.files import write_whole
from d2net.reading import load_json, missing, number, read_bytes
from d2net.tables import read_table, write_table
from d2net.words import NAME, escaped, quoted

__all__ = ["Annotations", "Detections", "Segments", "read_detections", "read_features", "write_detections"]


@dataclass(frozen=True)
class Segments:
    """Labelled time intervals of many recordings, one row each.

    Attributes:
        videos: Names of all recordings, including those without any segment.
        classes: Names of the action classes.
        video: (N,) int64, index into ``videos``.
        label: (N,) int64, index into ``classes``.
        start: (N,) float64, seconds.
        end: (N,) float64, seconds, exclusive.
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
    """Scored segments: what :func:`d2net.evaluation.evaluate` judges. ``score`` is (N,) float64.

    ``videos`` are all that were localized: those without a detection count as done, others as missing.
    """

    score: np.ndarray

    def at_least(self, score: float) -> Detections:
        """Those of this score or a higher one; the videos are all."""
        kept = self.score >= score
        rows = {name: getattr(self, name)[kept] for name in ("video", "label", "start", "end", "score")}
        return replace(self, **rows)


@dataclass(frozen=True)
class Annotations(Segments):
    """Ground truth.

    Attributes:
        ambiguous: (M, 3) float64 rows (recording index, start, end) of doubtful segments: the ``wtalc`` protocol drops
            a detection that touches one.
        withdrawn: Recordings whose segments are no longer ground truth (``video_test_0000270`` and
            ``video_test_0001496`` of THUMOS14 in the W-TALC folder, which has segments of them in ``segments.npy`` and
            none in ``test_gt_segments.npy``). The ``wtalc`` protocol leaves out recordings without segments, but not
            these.
        rank: (N,) int64, the order in which the ``wtalc`` protocol tries to match a detection with the segments of its
            recording. Published numbers depend on it: it is the order in the files of the W-TALC folder. None: by time.
    """

    ambiguous: np.ndarray
    withdrawn: tuple[str, ...] = ()
    rank: np.ndarray | None = None


def read_detections(path: str | os.PathLike[str]) -> Detections:
    """Detections from an ActivityNet JSON or, where the name ends in ``.csv``, from a CSV. Times are seconds.

    JSON: ``{"results": {video: [{"label", "score", "segment": [s, e]}]}}``; other keys are ignored, numbers may be
    strings, and ``null`` is a video without detections. CSV: the columns ``recording``, ``label``, ``start``, ``end``
    and ``score`` in any order, then a line for every detection, as :func:`d2net.tables.read_table` says; other columns
    are ignored.

    Returns:
        Detections in the order of the file. ``videos`` are those that the file lists, also in its order; a CSV lists
        only recordings with a detection. Classes are sorted.

    Raises:
        InputError: missing or damaged file, missing key or column, a label that is no string, a recording that comes
            twice in a JSON, a time or score that is no finite number, or a segment that ends before it starts.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: {missing(path)}; check the path")
    videos, rows = _read_csv(path) if _is_csv(path) else _read_results(path)
    classes = tuple(sorted({r[1] for r in rows}))
    return Detections(
        videos=videos,
        classes=classes,
        score=np.array([r[4] for r in rows], np.float64),
        **_columns(videos, classes, rows),
    )


def write_detections(path: str | os.PathLike[str], detections: Detections, features: str | None = None) -> None:
    """Write detections as ActivityNet JSON or, where the name ends in ``.csv``, as CSV.

    In JSON, videos without a detection get an empty list. A CSV (``recording,label,start,end,score``) can keep neither
    such videos nor ``features``; names that a spreadsheet would run as formulas begin with an apostrophe in it
    (:mod:`d2net.tables`). Both are read back by :func:`read_detections`, to the last bit, in the order of the
    videos. The file appears whole or not at all: it is written beside its place and then moved there.

    Args:
        path: The file.
        detections: What to write.
        features: What features the detections are from. Written under ``external_data``, where ActivityNet's rules want
            it, and read by :func:`read_features`.

    Raises:
        InputError: the file cannot be written, a time or score is not finite, or a name is no text that CSV can hold.
    """
    path = Path(path)
    results: dict[str, list[tuple[str, float, float, float]]] = {name: [] for name in detections.videos}
    columns = (detections.video, detections.label, detections.start, detections.end, detections.score)
    for video, label, start, end, score in zip(*(c.tolist() for c in columns), strict=True):
        name = detections.videos[video]
        if not (math.isfinite(start) and math.isfinite(end) and math.isfinite(score)):
            raise InputError(
                f"{path}: a detection of '{name}' has start {start}, end {end}, score {score}, which no file can "
                "hold; drop such detections before writing"
            )
        results[name].append((detections.classes[label], start, end, score))
    if _is_csv(path):
        text = write_table(_CSV_COLUMNS, ((name, *row) for name, its_rows in results.items() for row in its_rows))
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{path}: a name holds bytes that are no UTF-8 ({error}); write a .json instead"
            ) from error
        write_whole(path, text)
    else:
        entries = {
            name: [{"label": label, "score": score, "segment": [start, end]} for label, start, end, score in its_rows]
            for name, its_rows in results.items()
        }
        external = {"used": True, "details": features} if features else {}
        write_whole(path, json.dumps({"version": "VERSION 1.3", "results": entries, "external_data": external}))


def read_features(path: str | os.PathLike[str]) -> str | None:
    """The features that detections are from, as an ActivityNet JSON names them; None if it does not, as no CSV does."""
    path = Path(path)
    if _is_csv(path):
        return None
    data = _load_json(path)
    external = data.get("external_data") if isinstance(data, dict) else None
    details = external.get("details") if isinstance(external, dict) else None
    return details if isinstance(details, str) and details.strip() else None


_Scored = list[tuple[str, str, float, float, float]]  # video, class, start s, end s, score
_MEND = "mend or drop the segment"
_CSV_COLUMNS = ("recording", "label", "start", "end", "score")


def _is_csv(path: Path) -> bool:
    return path.suffix.lower() == ".csv"


def _read_results(path: Path) -> tuple[tuple[str, ...], _Scored]:
    """The recordings of an ActivityNet results JSON and its detections."""
    data = _load_json(path)
    if isinstance(data, dict) and "results" not in data and "database" in data:
        raise InputError(f"{path}: holds annotations ('database'), expected detections ({{\"results\": {{VIDEO: …}}}})")
    if not isinstance(data, dict) or not isinstance(data.get("results"), dict):
        raise InputError(f"{path}: no object under the key 'results'; expected {{\"results\": {{VIDEO: …}}}}")
    rows: _Scored = []
    for name, entries in data["results"].items():
        where = f"{path}: recording '{escaped(name, NAME)}'"
        if not isinstance(entries, list | None):
            raise InputError(f"{where}: expected a list of segments, got {type(entries).__name__}")
        for i, entry in enumerate(entries or []):
            rows.append((name, *_scored_segment(entry, f"{where}, detection {i}")))
    return tuple(data["results"]), rows


def _scored_segment(entry: Any, where: str) -> tuple[str, float, float, float]:
    """Class, start, end and score of an entry of a results JSON."""
    if not isinstance(entry, dict) or "segment" not in entry:
        raise InputError(f"{where}: expected an object with 'label', 'segment' ([start, end]) and 'score'")
    label = entry.get("label")
    if label is None:
        raise InputError(f"{where}: no 'label'; proposals without a class are no detections: name the class of each")
    if not isinstance(label, str):
        raise InputError(
            f"{where}: label is {quoted(label)}, not a string; write the name that the annotations give the class"
        )
    if "score" not in entry:
        raise InputError(f"{where}: no 'score'; give every detection one number")
    return label, *_segment(entry["segment"], where), number(entry["score"], f"{where}: score", _MEND)


def _load_json(path: Path) -> Any:
    """The content of a JSON of detections. Raises InputError for a pickle, too, with the way out."""
    content = read_bytes(path)
    if content[:1] == b"\x80" or path.suffix.lower() in (".pkl", ".pickle"):
        raise InputError(
            f"{path}: is a Python pickle, as ActionFormer's eval_results.pkl, which d2net does not open; write its "
            "columns video-id, label, t-start, t-end and score to a .csv with the header "
            f"{','.join(_CSV_COLUMNS)}, and the name of each class instead of its number"
        )
    return load_json(path, content)


def _read_csv(path: Path) -> tuple[tuple[str, ...], _Scored]:
    """The recordings of a CSV of detections, in the order in which they first come, and the detections."""
    rows: _Scored = []
    for row in read_table(path, _CSV_COLUMNS).rows:
        name, label = row.cells["recording"], row.cells["label"]
        if not name or not label:
            raise InputError(f"{row.where}: no {'label' if name else 'recording'}; fill it in or drop the line")
        start, end, score = (row.number(column, _MEND) for column in ("start", "end", "score"))
        rows.append((name, label, *_ordered(start, end, row.where), score))
    return tuple(dict.fromkeys(r[0] for r in rows)), rows


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


def _segment(pair: Any, where: str) -> tuple[float, float]:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise InputError(f"{where}: segment {quoted(pair)} is not a pair [start, end] in seconds")
    return _ordered(number(pair[0], f"{where}: start", _MEND), number(pair[1], f"{where}: end", _MEND), where)


def _ordered(start: float, end: float, where: str) -> tuple[float, float]:
    if end < start:
        raise InputError(f"{where}: segment ends at {end:g} before it starts at {start:g}; swap or drop it")
    return start, end
