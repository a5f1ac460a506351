"""Joins detections to annotations by the names of recordings and classes; suggests a known name for an unknown one."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import Literal, get_args

import numpy as np

from d2net.detections import Annotations, Detections
from d2net.errors import InputError
from d2net.evaluation.result import CLASS, Reason
from d2net.words import counted, did_you_mean, listed, plain

UnknownVideos = Literal["error", "ignore", "false_positive"]
_PREFIX = "v_"  # ActivityNet's video files have it, its annotations do not


def is_ambiguous(label: str) -> bool:
    return label.strip().casefold() == "ambiguous"


def find_prefix(detections: Detections, annotations: Annotations) -> tuple[tuple[str, ...], str]:
    """Names of the detections' recordings as the annotations have them, and how they were changed, in words, or "".

    If one name is known, none is changed.
    """
    names, known = detections.videos, set(annotations.videos)
    if not known.isdisjoint(names):
        return names, ""
    changes: dict[str, Callable[[str], str]] = {
        f"without the prefix '{_PREFIX}'": lambda name: name.removeprefix(_PREFIX),
        f"with the prefix '{_PREFIX}'": lambda name: _PREFIX + name,
    }
    used = np.unique(detections.video) if len(detections) else np.arange(len(names))
    for words, change in changes.items():
        changed = tuple(map(change, names))
        if len(used) and all(changed[v] in known for v in used):
            return changed, words
    return names, ""


def join(
    names: tuple[str, ...], detections: Detections, annotations: Annotations, unknown_videos: UnknownVideos
) -> tuple[np.ndarray, np.ndarray]:
    """(N,) recording and (N,) label of the detections, as indices into the names of ``annotations``.

    An unknown name has the index one past the last.

    Args:
        names: Of the detections' recordings, from :func:`find_prefix`.
        detections: All detections.
        annotations: The ground truth.
        unknown_videos: As for :func:`d2net.evaluation.evaluate`.

    Raises:
        InputError: an unknown recording or class that may not be ignored.
    """
    if unknown_videos not in get_args(UnknownVideos):
        raise InputError(f"unknown_videos is '{unknown_videos}'; choose {', '.join(get_args(UnknownVideos))}")
    video = index(names, annotations.videos)[detections.video]
    label = index(detections.classes, annotations.classes)[detections.label]
    strange = video == len(annotations.videos)
    if unknown_videos == "error" and strange.any():
        unknown = sorted({names[v] for v in np.unique(detections.video[strange])})
        raise InputError(
            f"the annotations do not list {counted(len(unknown), 'recording')} of the detections: {listed(unknown)}; "
            f"{_spelling(unknown, annotations.videos)}choose the subset that was localized, or drop these detections "
            "with --ignore-unknown-videos (in Python unknown_videos='ignore')"
        )
    unjudged = label == len(annotations.classes)
    if unknown_videos == "ignore":
        unjudged &= ~strange
    classes = [detections.classes[c] for c in np.unique(detections.label[unjudged])]
    if unknown := [c for c in classes if not is_ambiguous(c)]:
        raise InputError(
            f"the annotations do not have {counted(len(unknown), *CLASS)} of the detections: "
            + ", ".join(f"'{c}'{_similar(c, annotations.classes)}" for c in unknown[:3])
            + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
            + f"; they have {listed(annotations.classes, 20)}"
        )
    return video, label


def nothing_left(dropped: dict[Reason, int], names: tuple[str, ...], annotations: Annotations) -> str:
    reasons = {
        "in recordings that the annotations do not list (unknown_videos='ignore', --ignore-unknown-videos)": dropped[
            "unknown_video"
        ],
        "labelled 'Ambiguous', which is a mark and no class": dropped["ambiguous_label"],
        "in recordings without a segment, which the wtalc protocol leaves out": dropped["video_without_segments"],
    }
    known = set(annotations.videos)
    unknown = sorted(name for name in names if name not in known)
    hint = _spelling(unknown, annotations.videos) if dropped["unknown_video"] else ""
    return (
        f"no detection is left to judge, all {sum(dropped.values())} are dropped: "
        + ", ".join(f"{n} {reason}" for reason, n in reasons.items() if n)
        + f"; {hint}choose the subset that was localized and detections of its classes"
    )


def index(names: tuple[str, ...], known: tuple[str, ...]) -> np.ndarray:
    position = {name: i for i, name in enumerate(known)}
    return np.array([position.get(name, len(known)) for name in names], np.int64)


def _spelling(unknown: Iterable[str], known: Iterable[str]) -> str:
    """A hint where names differ only by ``v_``, a file's suffix, case, or blanks and underscores; else ""."""

    def bare(name: str) -> str:
        return re.sub(r"[\s_-]+", "_", unicodedata.normalize("NFKC", name.removeprefix(_PREFIX))).casefold()

    def stem(name: str) -> str:
        return re.sub(r"\.[A-Za-z]\w{1,4}$", "", name)

    whole = {bare(name): name for name in known}
    stems = {bare(stem(name)): name for name in known}
    unknown = list(unknown)
    # The suffix is removed on one side only: "clip.left" is not "clip.right".
    meant = [whole.get(bare(x)) or whole.get(bare(stem(x))) or stems.get(bare(x)) for x in unknown]
    pairs = [(x, other) for x, other in zip(unknown, meant, strict=True) if other]
    if not pairs:
        return ""
    return (
        f"the detections name '{pairs[0][0]}', the annotations '{pairs[0][1]}' ({len(pairs)} of {len(unknown)} differ "
        "like that: rename them in one of the files); else "
    )


def _similar(name: str, known: tuple[str, ...]) -> str:
    """A known class that may be meant by an unknown one, in brackets, or ""."""
    same = [other for other in known if plain(other) == plain(name)]
    if same:
        return f" (is '{same[0]}' in the annotations: rename it)"
    return did_you_mean(name, known)
