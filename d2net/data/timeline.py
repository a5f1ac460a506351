"""Annotations JSON: the one reader of it, for every layout and every command.

ActivityNet's form, ``{"database": {VIDEO: {"subset": …, "annotations": [{"segment": [s, e], "label": …}, …]}}}``,
times in seconds; or that of BMN and mmaction2, ``{VIDEO: {"duration_second": …, "annotations": […]}}``, whose subset is
in the name of the file. docs/data.md has every key.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from d2net.data.times import Times
from d2net.errors import InputError
from d2net.reading import number, read_json, read_text, seconds, typed
from d2net.words import NAME, escaped, listed, quoted

AMBIGUOUS = "ambiguous"  # THUMOS14's mark of a doubtful segment, whatever its case; it is no class
AMBIGUOUS_LIST = "Ambiguous_test.txt"  # THUMOS14's own list of such segments
# What the names of BMN's files end in, and ActivityNet's names of these subsets.
_BMN_SUBSETS = {"train": "training", "val": "validation", "test": "testing"}


@dataclass(frozen=True)
class Entry:
    """Annotations of one video.

    Attributes:
        subset: As the file spells it.
        labels: Names of its classes.
        segments: (start s, end s, class name) rows, by time, whatever the order of the file.
        ambiguous: (start s, end s) rows: doubtful segments, of no class.
        duration: In seconds, or None.
        times: What the file says of its snippets' times.
        covered: Seconds that all snippets cover together, where the file says that instead of a stride.
        num_frames: What some files call the frames of a window, and others those of the video.
        withdrawn: Whether its segments are no ground truth any longer (:class:`d2net.detections.Annotations`).
        without_segment: Annotations that name a class and no segment.
    """

    subset: str
    labels: tuple[str, ...] = ()
    segments: tuple[tuple[float, float, str], ...] = ()
    ambiguous: tuple[tuple[float, float], ...] = ()
    duration: float | None = None
    times: Times = field(default_factory=Times)
    covered: float | None = None
    num_frames: float | None = None
    withdrawn: bool = False
    without_segment: int = 0


@dataclass(frozen=True)
class Timeline:
    """A whole annotations file.

    Attributes:
        path: Of the file.
        classes: Names, in the order in which labels are counted.
        videos: By name.
        name: Of the dataset, where the file says it.
        streams: Widths of the streams, where the file says them.
    """

    path: Path
    classes: tuple[str, ...]
    videos: dict[str, Entry]
    name: str | None = None
    streams: tuple[int, ...] | None = None

    @property
    def remarks(self) -> list[str]:
        """Remarks on the file for the user, in sentences."""
        lost = {name: e.without_segment for name, e in self.videos.items() if e.without_segment and e.segments}
        if not lost:
            return []
        return [
            f"{sum(lost.values())} annotations of {len(lost)} recordings have no segment beside others that have one, "
            f"and count as labels alone: {listed(lost)}"
        ]


def read_timeline(path: Path, content: Any = None) -> Timeline:
    """Reads and checks an annotations file, and the list of ambiguous segments beside it, where there is one.

    Args:
        path: The file.
        content: What is in it, where it has been read already.

    Raises:
        InputError: naming the file and the video at fault.
    """
    top = read_json(path) if content is None else content
    if not is_annotations(top):
        raise InputError(f'{path}: has no "database" object; expected the ActivityNet annotations format')
    if not isinstance(top.get("database"), dict):
        top = {"database": top, "subset": _BMN_SUBSETS.get(path.stem.lower().rpartition("_")[2])}
    try:
        times = Times.read(top)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    videos: dict[str, Entry] = {}
    ids: dict[str, float] = {}
    for name, value in top["database"].items():
        try:
            videos[name] = _entry(value, ids, times, top.get("subset"))
        except InputError as error:
            raise InputError(
                f"{path}: video '{escaped(name, NAME)}': malformed entry ({error}); expected \"subset\" and "
                '"annotations": [{"segment": [start, end], "label": name}, …]'
            ) from None
    for name, rows in read_ambiguous(path.parent / AMBIGUOUS_LIST).items():
        if name in videos:  # the list is of one subset; other files may lack its videos
            together = dict.fromkeys((*videos[name].ambiguous, *rows))
            videos[name] = replace(videos[name], ambiguous=tuple(together))
    names = dict.fromkeys(
        label for e in videos.values() for label in (*e.labels, *(label for _, _, label in e.segments))
    )
    # Sorted names make the order of classes independent of the order of videos; label_id wins where given.
    classes = top.get("classes")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(c, str) for c in classes)):
        raise InputError(f'{path}: "classes" must be a list of names')
    classes = [c for c in classes or sorted(names, key=lambda c: (ids.get(c, math.inf), c)) if not is_ambiguous(c)]
    known = set(classes)
    unknown = [c for c in names if c not in known]
    if unknown:
        raise InputError(f"{path}: label '{unknown[0]}' is not in \"classes\"; add it there")
    name = top.get("name")
    return Timeline(
        path,
        tuple(classes),
        videos,
        name if isinstance(name, str) else None,
        None if top.get("streams") is None else stream_widths(path, top["streams"]),
    )


def is_annotations(content: Any) -> bool:
    """Whether the value of a JSON file is annotations, not detections, settings or anything else."""
    if not isinstance(content, dict):
        return False
    first = next(iter(content.values()), None)
    return isinstance(content.get("database"), dict) or (isinstance(first, dict) and "annotations" in first)


def is_ambiguous(label: str) -> bool:
    return label.strip().lower() == AMBIGUOUS


def read_ambiguous(path: Path) -> dict[str, list[tuple[float, float]]]:
    """(start s, end s) rows of each video in a list of lines "VIDEO START END"; none without the file.

    Raises:
        InputError: a line of another form, or a file that cannot be read.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    if not os.path.lexists(path):  # a broken link is an error below, not a missing file
        return found
    for i, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        words = line.rsplit(maxsplit=2)  # a name may hold spaces
        try:
            if len(words) != 3:
                raise InputError("a name, a start and an end in seconds")
            found.setdefault(words[0].strip(), []).append(segment(words[1:]))
        except InputError as error:
            said = f"{path}: line {i}: '{escaped(line.strip(), NAME)}'"
            raise InputError(f"{said} is not VIDEO START END ({error}); mend it") from None
    return found


def segment(pair: Any) -> tuple[float, float]:
    """A pair of times in seconds. Raises InputError for anything else."""
    pair = pair.tolist() if isinstance(pair, np.ndarray) else pair
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise InputError(f"segment {quoted(pair)} is not a pair [start, end] in seconds")
    start, end = (seconds(t, '"segment"') for t in pair)
    if not 0 <= start <= end:
        raise InputError(f"segment [{start}, {end}] is not 0 <= start <= end")
    return start, end


def choose(wanted: Sequence[str] | None, there: Sequence[str], source: str | Path) -> tuple[str, ...]:
    """Subsets to open, all by default; "all" names them all. A name may differ in case from the only one it can mean.

    Raises:
        InputError: one that is not there, or a dataset without recordings.
    """
    present = tuple(dict.fromkeys(there))
    if not present:
        raise InputError(f"{source}: holds no video; every subset is empty")
    chosen: dict[str, None] = {}
    for name in wanted or present:
        alike = [s for s in present if s.lower() == name.lower()]
        if name in present:
            chosen[name] = None
        elif name.lower() == "all":
            chosen.update(dict.fromkeys(present))
        elif len(alike) == 1:
            chosen[alike[0]] = None
        else:
            raise InputError(f"{source}: there is no subset '{name}'; there are {', '.join(present)}")
    return tuple(chosen)


def _entry(value: Any, ids: dict[str, float], top: Times, subset: Any) -> Entry:
    value = typed(value, dict, "it")
    segments: list[tuple[float, float, str]] = []
    ambiguous = [segment(pair) for pair in _list(value, "ambiguous")]
    labels: dict[str, None] = {}
    without_segment = 0
    if "annotations" not in value:  # a misspelt key would silently lose the annotations
        raise InputError('no "annotations"; give an empty list where there are none')
    for i, row in enumerate(typed(value["annotations"], list, '"annotations"')):
        if "label" not in typed(row, dict, f"annotation {i}"):
            raise InputError(f"annotation {i} has no 'label'")
        label = _name(row["label"], "label")
        pair = segment(row["segment"]) if "segment" in row else None
        if is_ambiguous(label):
            ambiguous += [pair] if pair else []
            continue
        labels[label] = None
        if row.get("label_id") is not None:  # the smallest of several, so that the order of the file does not matter
            ids[label] = min(number(row["label_id"], '"label_id"'), ids.get(label, math.inf))
        if pair:
            segments.append((*pair, label))
        else:
            without_segment += 1
    if "labels" in value:
        labels = dict.fromkeys(
            c for x in typed(value["labels"], list, '"labels"') if not is_ambiguous(c := _name(x, "label"))
        )
    if value.get("subset") is None and subset is None:
        raise InputError(
            'no "subset"; add it, or, in a file as BMN has them, end the name of the file in _train, _val or _test, as '
            "anet_anno_train.json"
        )
    duration = positive(value, "duration", "duration_second")
    frames = positive(value, "frame", "duration_frame")
    part = positive(value, "feature_frame")
    own = Times.read({key: x for key, x in value.items() if key != "num_frames"})
    times = own.over(top)
    known = times.stride is not None and times.seconds_per_snippet is not None  # which fps would contradict
    if times.fps is None and frames and duration and not known:
        times = replace(times, fps=frames / duration)
    return Entry(
        subset=_name(subset if value.get("subset") is None else value["subset"], "subset"),
        labels=tuple(labels),
        segments=tuple(sorted(segments)),
        ambiguous=tuple(dict.fromkeys(ambiguous)),
        duration=duration,
        times=times,
        num_frames=None if own.window is not None else positive(value, "num_frames"),
        covered=part / frames * duration if part and frames and duration else None,
        withdrawn=value.get("withdrawn") is True,
        without_segment=without_segment,
    )


def _list(table: dict[str, Any], key: str) -> list[Any]:
    """The list under ``key``; [] where there is none."""
    return [] if table.get(key) is None else typed(table[key], list, f'"{key}"')


def _name(value: Any, what: str) -> str:
    """A label or subset; a label that is a number is written out."""
    if isinstance(value, str) and value.strip():
        return value.strip() if what == "subset" else value
    if what == "label" and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise InputError(f'"{what}" is {quoted(value)}, expected a name')


def stream_widths(path: Path, value: Any) -> tuple[int, ...]:
    """The value of "streams" in a JSON. Raises InputError where it is no list of one or two widths."""
    if not isinstance(value, list) or not 1 <= len(value) <= 2 or not all(type(w) is int and w > 0 for w in value):
        said = f'{path}: "streams" is {quoted(value)}'
        raise InputError(f"{said}; give the width of each stream, as [1024, 1024] or [2048]")
    return tuple(value)


def positive(value: dict[str, Any], *keys: str) -> float | None:
    """The number under the first of ``keys`` that exists; None if none does."""
    for key in keys:
        if value.get(key) is not None:
            found = (seconds if key.startswith("duration") and key != "duration_frame" else number)(
                value[key], f'"{key}"'
            )
            if found <= 0:
                raise InputError(f'"{key}" is {found:g}, expected a positive number')
            return found
    return None
