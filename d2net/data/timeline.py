"""Annotations JSON: the one reader of it, for every layout and every command.

ActivityNet's form, ``{"database": {VIDEO: {"subset": …, "annotations": [{"segment": [s, e], "label": …}, …]}}}``,
times in seconds; or that of BMN and mmaction2, ``{VIDEO: {"duration_second": …, "annotations": […]}}``, whose subset is
in the name of the file. docs/data.md has every key.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from d2net.data.files import read_json
from d2net.data.times import Times, number
from d2net.errors import InputError

AMBIGUOUS = "ambiguous"  # THUMOS14's mark of a doubtful segment, whatever its case; it is no class
AMBIGUOUS_LIST = "Ambiguous_test.txt"  # THUMOS14's own list of such segments
# What the names of BMN's files end in, and ActivityNet's names of these subsets.
_BMN_SUBSETS = {"train": "training", "val": "validation", "test": "testing"}
_PLAUSIBLE_FPS = (5, 130)


@dataclass(frozen=True)
class Entry:
    """Annotations of one video.

    Attributes:
        subset: As the file spells it.
        labels: Names of its classes.
        segments: (start s, end s, class name) rows.
        ambiguous: (start s, end s) rows: doubtful segments, of no class.
        duration: In seconds, or None.
        times: What the file says of its snippets' times.
        covered: Seconds that all snippets cover together, where the file says that instead of a stride.
        withdrawn: Whether its segments are no ground truth any longer (:class:`d2net.detections.Annotations`).
    """

    subset: str
    labels: tuple[str, ...] = ()
    segments: tuple[tuple[float, float, str], ...] = ()
    ambiguous: tuple[tuple[float, float], ...] = ()
    duration: float | None = None
    times: Times = field(default_factory=Times)
    covered: float | None = None
    withdrawn: bool = False


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


def read_timeline(path: Path) -> Timeline:
    """Reads and checks an annotations file, and the list of ambiguous segments beside it, where there is one.

    Raises:
        InputError: naming the file and the video at fault.
    """
    top = read_json(path)
    subset = _bmn_subset(path, top) if "database" not in top and _is_bmn(top) else None
    database = top if subset is not None else top.get("database")
    if not isinstance(database, dict):
        raise InputError(f'{path}: has no "database" object; expected the ActivityNet annotations format')
    try:
        times = Times() if subset is not None else Times.read(top)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    videos: dict[str, Entry] = {}
    ids: dict[str, int] = {}
    for name, value in database.items():
        try:
            videos[name] = _entry(value, ids, times, subset)
        except (KeyError, TypeError, ValueError, AttributeError) as error:  # InputError is a ValueError
            reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            raise InputError(
                f"{path}: video '{name}': malformed entry ({reason}); expected \"subset\" and "
                '"annotations": [{"segment": [start, end], "label": name}, …]'
            ) from None
    names = dict.fromkeys(
        label for e in videos.values() for label in (*e.labels, *(label for _, _, label in e.segments))
    )
    for name, rows in read_ambiguous(path.parent / AMBIGUOUS_LIST).items():
        if name in videos:  # the list is of one subset; other files may lack its videos
            videos[name] = replace(videos[name], ambiguous=(*videos[name].ambiguous, *rows))
    listed = None if subset is not None else top.get("classes")
    # Sorted names make the order of classes independent of the order of videos; label_id wins where given.
    classes = listed or sorted(names, key=lambda c: (ids.get(c, math.inf), c))
    if not isinstance(classes, list) or not all(isinstance(c, str) for c in classes):
        raise InputError(f'{path}: "classes" must be a list of names')
    classes = [c for c in classes if not is_ambiguous(c)]
    unknown = [c for c in names if c not in classes]
    if unknown:
        raise InputError(f"{path}: label '{unknown[0]}' is not in \"classes\"; add it there")
    name = top.get("name") if subset is None else None
    return Timeline(
        path,
        tuple(classes),
        videos,
        name if isinstance(name, str) else None,
        None if subset is not None or top.get("streams") is None else _widths(path, top["streams"]),
    )


def is_annotations(path: Path) -> bool:
    """Whether a JSON file holds annotations, and not detections, settings or anything else."""
    top = read_json(path)
    return isinstance(top.get("database"), dict) or _is_bmn(top)


def is_ambiguous(label: str) -> bool:
    return label.strip().lower() == AMBIGUOUS


def read_ambiguous(path: Path) -> dict[str, list[tuple[float, float]]]:
    """(start s, end s) rows of each video in a list of lines "VIDEO START END"; none without the file.

    Raises:
        InputError: a line of another form, or a file that cannot be read.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    if not path.exists():
        return found
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); mend or remove it") from error
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        words = line.rsplit(maxsplit=2)  # a name may hold spaces
        try:
            if len(words) != 3:
                raise InputError("a name, a start and an end in seconds")
            found.setdefault(words[0].strip(), []).append(segment(words[1:]))
        except InputError as error:
            raise InputError(f"{path}: line {i}: '{line.strip()}' is not VIDEO START END ({error}); mend it") from None
    return found


def segment(pair: Any) -> tuple[float, float]:
    """A pair of times in seconds. Raises InputError for anything else."""
    if isinstance(pair, str) or len(pair) != 2:
        raise InputError(f"segment {pair!r} is not a pair [start, end] in seconds")
    start, end = (number(t, "segment") for t in pair)
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
            raise InputError(f"{source}: subset '{name}' is empty; there are {', '.join(present)}")
    return tuple(chosen)


def _entry(value: dict[str, Any], ids: dict[str, int], top: Times, subset: str | None) -> Entry:
    segments: list[tuple[float, float, str]] = []
    ambiguous = [segment(pair) for pair in value.get("ambiguous") or ()]
    labels: dict[str, None] = {}
    for row in value.get("annotations") or ():
        label = str(row["label"])
        pair = segment(row["segment"]) if "segment" in row else None
        if is_ambiguous(label):
            ambiguous += [pair] if pair else []
            continue
        labels[label] = None
        if "label_id" in row:
            ids.setdefault(label, int(row["label_id"]))
        if pair:
            segments.append((*pair, label))
    if "labels" in value:
        if not isinstance(value["labels"], list):
            raise TypeError('"labels" is not a list')
        labels = dict.fromkeys(str(label) for label in value["labels"] if not is_ambiguous(str(label)))
    duration = _positive(value, "duration", "duration_second")
    frames = _positive(value, "frame", "duration_frame")
    covered = None
    if subset is not None and frames and duration and (part := _positive(value, "feature_frame")):
        covered = part / frames * duration
    own = dict(value)
    total = _positive(value, "num_frames")
    if total and duration and _counts_the_video(total / duration, _positive(value, "fps")):
        frames = frames or total
        del own["num_frames"]
    times = Times.read(own)
    if times.fps is None and frames and duration:
        times = Times.read({**own, "fps": frames / duration})
    return Entry(
        subset=str(value["subset"]) if subset is None else subset,
        labels=tuple(labels),
        segments=tuple(segments),
        ambiguous=tuple(ambiguous),
        duration=duration,
        times=times.over(top),
        covered=covered,
        withdrawn=value.get("withdrawn") is True,
    )


def _counts_the_video(rate: float, fps: float | None) -> bool:
    """Whether a video's ``num_frames`` is the number of its frames (as in some files) and not that of a window."""
    return abs(rate / fps - 1) < 0.05 if fps else _PLAUSIBLE_FPS[0] <= rate <= _PLAUSIBLE_FPS[1]


def _is_bmn(top: dict[str, Any]) -> bool:
    first = next(iter(top.values()), None)
    return isinstance(first, dict) and "annotations" in first and "database" not in top


def _bmn_subset(path: Path, top: dict[str, Any]) -> str:
    entry = next(iter(top.values()))
    if isinstance(entry.get("subset"), str):
        return entry["subset"]
    word = path.stem.lower().rpartition("_")[2]
    if word not in _BMN_SUBSETS:
        raise InputError(
            f"{path}: its videos name no subset; end the name of the file in _train, _val or _test, as "
            'anet_anno_train.json, or add "subset" to every video'
        )
    return _BMN_SUBSETS[word]


def _widths(path: Path, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= 2 or not all(isinstance(w, int) and w > 0 for w in value):
        raise InputError(f'{path}: "streams" is {value!r}; give the width of each stream, as [1024, 1024] or [2048]')
    return tuple(value)


def _positive(value: dict[str, Any], *keys: str) -> float | None:
    """The number under the first of ``keys`` that is there, None where none is."""
    for key in keys:
        if value.get(key) is not None:
            found = number(value[key], key)
            if found <= 0:
                raise InputError(f'"{key}" is {found:g}, expected a positive number')
            return found
    return None
