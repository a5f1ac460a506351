"""ActivityNet-style annotations JSON, the common part of layouts 2, 3 and 6.

``{"database": {VIDEO: {"subset": …, "annotations": [{"segment": [s, e], "label": …}, …]}}}``, times in
seconds. Optional per video or at the top: ``fps`` and ``stride`` (or ``feat_stride``); per video: ``duration``,
``frame`` and ``labels`` (the recording-level labels, where they are not just those of the segments); at the top:
``classes`` and ``name``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2net.data.files import read_json
from d2net.errors import InputError


@dataclass(frozen=True)
class Entry:
    """Annotations of one video; ``segments`` are (start s, end s, class name)."""

    subset: str
    labels: tuple[str, ...]
    segments: tuple[tuple[float, float, str], ...]
    duration: float | None = None
    fps: float | None = None
    stride: float | None = None


@dataclass(frozen=True)
class Timeline:
    """A whole annotations file. ``fps`` and ``stride`` are those at its top, if any."""

    path: Path
    classes: tuple[str, ...]
    videos: dict[str, Entry]
    name: str | None = None
    fps: float | None = None
    stride: float | None = None

    def seconds_per_snippet(self, video: str, *, stride: float, fps: float | None) -> float:
        """stride / fps of a video: its own values, else those at the top of the file, else the arguments.

        Raises:
            InputError: no fps anywhere.
        """
        entry = self.videos.get(video)
        stride = (entry and entry.stride) or self.stride or stride
        rate = (entry and entry.fps) or self.fps or fps
        if rate is None:
            raise InputError(f"{self.path}: video '{video}' has no \"fps\"; add it there or at the top of the file")
        return stride / rate


def read_timeline(path: Path) -> Timeline:
    """Reads and checks an annotations file. Raises InputError naming the file and the video at fault."""
    top = read_json(path)
    database = top.get("database")
    if not isinstance(database, dict):
        raise InputError(f'{path}: has no "database" object; expected the ActivityNet annotations format')
    videos: dict[str, Entry] = {}
    ids: dict[str, int] = {}
    for name, value in database.items():
        where = f"{path}: video '{name}'"
        try:
            videos[name] = _entry(value, ids)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f'{where}: malformed entry ({type(error).__name__}: {error}); expected "subset" and '
                '"annotations": [{"segment": [start, end], "label": name}, …]'
            ) from None
    names = dict.fromkeys(
        label for e in videos.values() for label in (*e.labels, *(label for _, _, label in e.segments))
    )
    # Sorted names make the order of classes independent of the order of videos; label_id wins where given.
    classes = top.get("classes") or sorted(names, key=lambda c: (ids.get(c, math.inf), c))
    if not isinstance(classes, list) or not all(isinstance(c, str) for c in classes):
        raise InputError(f'{path}: "classes" must be a list of names')
    unknown = [c for c in names if c not in classes]
    if unknown:
        raise InputError(f"{path}: label '{unknown[0]}' is not in \"classes\"; add it there")
    try:
        fps, stride = _positive(top, "fps"), _stride(top)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None
    name = top.get("name")
    return Timeline(path, tuple(classes), videos, name if isinstance(name, str) else None, fps, stride)


def choose(wanted: Sequence[str] | None, there: Sequence[str], source: str | Path) -> tuple[str, ...]:
    """Subsets to open, all by default. Raises InputError for one that is not there."""
    present = tuple(dict.fromkeys(there))
    for name in wanted or ():
        if name not in present:
            raise InputError(f"{source}: subset '{name}' is empty; there are {', '.join(present) or 'none'}")
    if not present:
        raise InputError(f"{source}: holds no video; every subset is empty")
    return tuple(wanted) if wanted else present


def _entry(value: dict[str, Any], ids: dict[str, int]) -> Entry:
    segments = []
    labels: dict[str, None] = {}
    for row in value.get("annotations", ()):
        label = str(row["label"])
        labels[label] = None
        if "label_id" in row:
            ids.setdefault(label, int(row["label_id"]))
        if "segment" in row:
            start, end = (float(t) for t in row["segment"])
            if not (math.isfinite(end) and 0 <= start <= end):
                raise ValueError(f"segment [{start}, {end}] is not 0 <= start <= end")
            segments.append((start, end, label))
    if "labels" in value:
        if not isinstance(value["labels"], list):
            raise TypeError('"labels" is not a list')
        labels = dict.fromkeys(str(label) for label in value["labels"])
    duration, fps = _positive(value, "duration"), _positive(value, "fps")
    frames = _positive(value, "frame")
    if fps is None and frames and duration:
        fps = frames / duration
    return Entry(str(value["subset"]), tuple(labels), tuple(segments), duration, fps, _stride(value))


def _stride(value: dict[str, Any]) -> float | None:
    return _positive(value, "feat_stride") or _positive(value, "stride")


def _positive(value: dict[str, Any], key: str) -> float | None:
    """The number under ``key``, None where absent or null."""
    if value.get(key) is None:
        return None
    number = float(value[key])
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f'"{key}" is {number}, expected a positive number')
    return number
