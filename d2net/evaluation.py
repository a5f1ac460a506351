"""Mean average precision and F1 of detections, under the two protocols of the field.

``activitynet``, after the ActivityNet toolkit (activitynet/ActivityNet, Evaluation/eval_detection.py): time is
continuous; detections of a class by falling score, each takes the unmatched ground truth with the highest IoU among
those that reach the threshold (of equal IoUs the later in time). A detection in a video without ground truth of its
class is a false positive, also where the video has none at all. Ambiguous segments are not known.

``wtalc``, after the W-TALC family (naraysa/D2-Net, detectionMAP.py, from sujoyp/wtalc-pytorch, whose AP is not
interpolated): times become snippet indices, round(s * 25 / 16), half to even, and IoU is that of index ranges; each
detection takes the first unmatched ground truth that reaches the threshold, in order of time, or of the W-TALC
family's own files (``Annotations.rank``).
Videos without segments are left out with all their detections, and so are detections touching an ambiguous segment
(of any class). Two faults are not followed: a class without detections shifts the ground truth of all later classes
by one (D2-Net), or makes the mAP 0 (W-TALC); here its AP is 0 and the others are what they are.

The order of a file says nothing, under neither: detections of equal score come by recording (its name), start and end,
and ground truth by start and end. The published evaluators leave that to the file and to an unstable sort.

Under both, the mean is over the classes that have ground truth, and a class without detections has AP 0. What was left
out, and why, is in :class:`Coverage`. docs/evaluation.md has a table of missing, ambiguous, empty and unknown.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from d2net.detections import Annotations, Detections, Segments
from d2net.errors import InputError
from d2net.words import did_you_mean, listed, plain

Protocol = Literal["activitynet", "wtalc"]
UnknownVideos = Literal["error", "ignore", "false_positive"]
Reason = Literal["unknown_video", "ambiguous_label", "video_without_segments", "ambiguous_segment"]
THUMOS14_TIOU = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
ACTIVITYNET_TIOU = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
_SNIPPETS_PER_SECOND = 25 / 16
_LARGEST_TIME = 1e300  # seconds: no sum of a few overflows
_PREFIX = "v_"  # ActivityNet's video files have it, its annotations do not
_CLASS = ("class", "classes")


@dataclass(frozen=True)
class Coverage:
    """What an evaluation judged, left out and missed. Recordings are sorted by name, classes in the annotations' order.

    Attributes:
        protocol: ``activitynet`` or ``wtalc``.
        recordings: Recordings of the annotations.
        without_segments: Those without a segment.
        judged: Recordings that count: under ``wtalc`` not those without segments (other than
            ``Annotations.withdrawn``).
        without_detections: Recordings that count, without a detection.
        unlisted: Those of them that the detections do not list at all: perhaps nobody looked for actions there.
        renamed: What was done to the names of the detections' videos to find them in the annotations, or "".
        detections: Detections, dropped ones included.
        dropped: Detections that do not count, each under the first reason that holds.
        false_positives: Detections that can only be false positives, whatever their times.
        classes: Classes with ground truth, over which the mean is.
        classes_without_segments: The other classes of the annotations: they do not enter the mean.
        classes_without_detections: Classes with ground truth and without a detection that counts: AP 0, in the mean.
        ambiguous_segments: Ambiguous segments of the annotations.
        outside_mean: Detections of classes without ground truth, which count in F1 alone.
    """

    protocol: str
    recordings: int
    without_segments: tuple[str, ...]
    judged: int
    without_detections: tuple[str, ...]
    unlisted: tuple[str, ...]
    renamed: str
    detections: int
    dropped: dict[Reason, int]
    false_positives: dict[Reason, int]
    classes: int
    classes_without_segments: tuple[str, ...]
    classes_without_detections: tuple[str, ...]
    ambiguous_segments: int
    outside_mean: int = 0

    def lines(self) -> list[str]:
        """Short sentences to print: one, and one for every count that is not what one hopes for."""
        left = self.detections - sum(self.dropped.values())
        lines = [
            f"judged: {_count(left, 'detection')} against {_count(self.judged, 'recording')}, "
            f"{_count(self.classes, *_CLASS)} with ground truth"
            + ("" if left else "; THERE IS NO DETECTION TO JUDGE, so every number is 0")
        ]
        if self.renamed:
            lines.append(f"names: the recordings of the detections are known only {self.renamed}, and are taken so")
        unlisted = set(self.unlisted)
        empty = [name for name in self.without_detections if name not in unlisted]
        of = f"of {_count(self.judged, 'recording')}"
        if unlisted:
            missed = len(unlisted - set(self.without_segments))
            lines.append(
                f"not listed in the detections: {len(unlisted)} {of} ({listed(self.unlisted)}); "
                + ("their segments are missed" if missed == len(unlisted) else f"the segments of {missed} are missed")
            )
        if empty:
            lines.append(f"listed without a detection: {len(empty)} {of} ({listed(empty)})")
        if self.without_segments:
            outcomes = {
                "dropped": self.dropped["video_without_segments"],
                "as false positives": self.false_positives["video_without_segments"],
            }
            there = ", ".join(f"{n} {outcome}" for outcome, n in outcomes.items() if n) or "none"
            lines.append(
                f"without a segment: {_count(len(self.without_segments), 'recording')} "
                f"({listed(self.without_segments)}); detections there: {there}"
            )
        for counts, outcome in ((self.dropped, "dropped"), (self.false_positives, "as false positives")):
            if n := counts["unknown_video"]:
                lines.append(f"in recordings that the annotations do not list: {_count(n, 'detection')} {outcome}")
        if n := self.dropped["ambiguous_label"]:
            lines.append(f"labelled 'Ambiguous', which is a mark and no class: {_count(n, 'detection')} dropped")
        if self.ambiguous_segments:
            there = f"{_count(self.dropped['ambiguous_segment'], 'detection')} touching one dropped"
            if self.protocol == "activitynet":
                there = "the activitynet protocol does not know them, detections there count as any other"
            lines.append(f"ambiguous segments: {self.ambiguous_segments}; {there}")
        if names := self.classes_without_segments:
            there = f"; {_count(self.outside_mean, 'detection')} there, in F1 alone" if self.outside_mean else ""
            lines.append(
                f"without ground truth, not in the mean: {_count(len(names), *_CLASS)} ({listed(names)}){there}"
            )
        if (names := self.classes_without_detections) and left:
            lines.append(f"without a detection, AP 0 in the mean: {_count(len(names), *_CLASS)} ({listed(names)})")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dump``."""
        return {key: list(x) if isinstance(x, tuple) else x for key, x in asdict(self).items()}


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found. ``map``, ``average``, ``f1`` and ``per_class`` are in percent.

    Attributes:
        protocol: ``activitynet`` or ``wtalc``.
        tiou: The N temporal IoU thresholds.
        map: (N,) float64, mean AP over the classes that have ground truth.
        average: Mean of ``map``.
        f1: F1 at the IoU ``f1_tiou`` of all detections as given, over all classes.
        per_class: AP of each class that has ground truth, one number a threshold.
        coverage: What was judged, left out and missed.
    """

    protocol: str
    tiou: tuple[float, ...]
    map: np.ndarray
    average: float
    f1: float
    per_class: dict[str, list[float]]
    coverage: Coverage

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dump``; ``map`` by IoU, ``{"0.5": 36.0}``."""
        return {
            "protocol": self.protocol,
            "map": {f"{t:g}": float(m) for t, m in zip(self.tiou, self.map, strict=True)},
            "average": self.average,
            "f1": self.f1,
            "per_class": self.per_class,
            "coverage": self.coverage.to_json(),
        }


def evaluate(
    detections: Detections,
    annotations: Annotations,
    protocol: Protocol = "activitynet",
    tiou: float | Iterable[float] = THUMOS14_TIOU,
    f1_tiou: float = 0.5,
    *,
    unknown_videos: UnknownVideos = "error",
) -> Evaluation:
    """Compare detections with ground truth (module docstring: the two protocols).

    AP is the area under the interpolated precision-recall curve. The result is the same, to the last bit, whatever the
    order of detections, annotations and recordings (module docstring: how ties are broken). Detections past the end of
    a video are judged as they are. F1 = 2 TP / (2 TP + FP + FN) takes the detections as retained, without a search for
    a score threshold, as in Table 3 of the paper; TP, FP and FN are summed over all classes, those without ground truth
    too.

    Detections labelled "Ambiguous" (in any case) are dropped: that is a mark of the annotations and no class.

    Args:
        detections, annotations: Joined by the names of their videos and classes. If no video of the detections is
            known and all with a detection are once ``v_`` is removed from, or put before, their names, as ActivityNet's
            files and annotations differ, they are taken as those, and ``coverage.renamed`` says so.
        tiou: Temporal IoU thresholds, each in (0, 1].
        f1_tiou: The IoU of the F1 score.
        unknown_videos: What detections in videos that ``annotations`` does not list are: an ``error``, nothing
            (``ignore``), or each a ``false_positive`` (what the ActivityNet toolkit does).

    Raises:
        InputError: unknown protocol, video or class; a threshold outside (0, 1]; no ground truth; a time or score
            that is not finite; a segment that ends before it starts; detections of which none is left, because of
            unknown videos, the label "Ambiguous", or videos without segments.
    """
    try:
        tiou = (float(tiou),) if isinstance(tiou, (int, float, str)) else tuple(float(t) for t in tiou)
    except (TypeError, ValueError):
        raise InputError(f"tiou is {tiou!r}; give one IoU threshold or several, as (0.3, 0.5)") from None
    if protocol not in get_args(Protocol):
        raise InputError(f"protocol '{protocol}' is unknown; choose activitynet or wtalc")
    if not tiou or not all(0 < t <= 1 for t in (*tiou, f1_tiou)):
        raise InputError(f"IoU thresholds {[*tiou]} and {f1_tiou} for F1: give at least one, each above 0 and up to 1")
    if len(annotations) == 0:
        raise InputError("the annotations hold no segment; choose a subset that has ground truth")
    if marks := [c for c in annotations.classes if _is_ambiguous(c)]:
        raise InputError(f"the annotations have a class '{marks[0]}', which is a mark: put its rows into `ambiguous`")
    _check(annotations, "annotation")
    _check(detections, "detection")

    names, renamed = _find_prefix(detections, annotations)
    video, label = _join(names, detections, annotations, unknown_videos)
    start, end = detections.start, detections.end
    # Which of several ground truths a detection takes depends on their order.
    by_time, rank = (annotations.end, annotations.start), annotations.rank if protocol == "wtalc" else None
    offered = np.lexsort(by_time if rank is None else (*by_time, rank))
    gt_video, gt_label = annotations.video[offered], annotations.label[offered]
    gt_start, gt_end = annotations.start[offered], annotations.end[offered]

    # By video; the last entry stands for all unknown ones.
    n_groups = len(annotations.videos) + 1
    unknown = video == n_groups - 1
    has_segment = np.bincount(annotations.video, minlength=n_groups) > 0
    judged = np.ones(n_groups, bool)
    if protocol == "wtalc":
        judged[:-1] = has_segment[:-1] | [name in annotations.withdrawn for name in annotations.videos]
    detected, listed = np.zeros(n_groups, bool), np.zeros(n_groups, bool)
    detected[video] = True
    listed[_index(names, annotations.videos)] = True

    keep = np.ones(len(detections), bool)
    dropped, false_positives = _no_counts(), _no_counts()

    def drop(reason: Reason, where: np.ndarray) -> None:
        dropped[reason] = int((keep & where).sum())
        keep[where] = False

    drop("unknown_video", unknown & (unknown_videos == "ignore"))
    drop("ambiguous_label", np.array([_is_ambiguous(c) for c in detections.classes], bool)[detections.label])
    drop("video_without_segments", ~judged[video])
    if len(detections) and not keep.any():
        raise InputError(_nothing_left(dropped, names, annotations))
    if protocol == "wtalc":
        start, end, gt_start, gt_end = (_snippets(x) for x in (start, end, gt_start, gt_end))
        ambiguous = annotations.ambiguous
        touching, _, _ = _overlaps(
            video, start, end, ambiguous[:, 0].astype(np.int64), _snippets(ambiguous[:, 1]), _snippets(ambiguous[:, 2])
        )
        touches = np.zeros(len(detections), bool)
        touches[touching] = True
        drop("ambiguous_segment", touches)
    false_positives["unknown_video"] = int((keep & unknown).sum())
    false_positives["video_without_segments"] = int((keep & ~unknown & ~has_segment[video]).sum())

    order = _ranked(np.nonzero(keep)[0], detections, names, label.astype(np.min_scalar_type(len(annotations.classes))))
    video, label, start, end = video[order], label[order], start[order], end[order]

    # Only pairs that reach the lowest IoU matter; a detection in none of them is a false positive.
    det, gt, iou = _overlaps(label * n_groups + video, start, end, gt_label * n_groups + gt_video, gt_start, gt_end)
    near = iou >= min(*tiou, f1_tiou)
    det, gt, iou = det[near], gt[near], iou[near]
    # Pairs are ordered by detection; those of a detection with several now by its preference.
    several = np.nonzero((np.diff(det, prepend=-1) == 0) | (np.diff(det, append=-1) == 0))[0]
    d, g, v = det[several], gt[several], iou[several]
    preference = np.lexsort((g, d) if protocol == "wtalc" else (-g, -v, d))
    gt[several], iou[several] = g[preference], v[preference]

    hits = {t: _match(det[iou >= t], gt[iou >= t], len(annotations)) for t in {*tiou, f1_tiou}}
    ap = 100 * np.stack([_average_precision(hits[t], label, annotations) for t in tiou], axis=1)
    present = np.bincount(annotations.label, minlength=len(ap)) > 0
    mean = ap[present].mean(axis=0)
    return Evaluation(
        protocol=protocol,
        tiou=tiou,
        map=mean,
        average=float(mean.mean()),
        # 2 TP + FP + FN is the number of detections plus the number of ground truths.
        f1=100 * 2 * len(hits[f1_tiou]) / (len(order) + len(annotations)),
        per_class={annotations.classes[c]: ap[c].tolist() for c in np.nonzero(present)[0]},
        coverage=Coverage(
            protocol=protocol,
            recordings=len(annotations.videos),
            without_segments=tuple(sorted(_chosen(annotations.videos, ~has_segment))),
            judged=int(judged[:-1].sum()),
            without_detections=tuple(sorted(_chosen(annotations.videos, judged & ~detected))),
            unlisted=tuple(sorted(_chosen(annotations.videos, judged & ~listed))),
            renamed=renamed,
            detections=len(detections),
            dropped=dropped,
            false_positives=false_positives,
            classes=int(present.sum()),
            classes_without_segments=_chosen(annotations.classes, ~present),
            outside_mean=int((~present[label]).sum()),
            classes_without_detections=_chosen(
                annotations.classes, present & (np.bincount(label, minlength=len(ap)) == 0)
            ),
            ambiguous_segments=len(annotations.ambiguous),
        ),
    )


def _ranked(which: np.ndarray, detections: Detections, names: tuple[str, ...], label: np.ndarray) -> np.ndarray:
    """Indices ``which`` of detections by class, then by falling score, then by recording, start and end.

    Args:
        names: Of the detections' videos, as the annotations have them.
        label: (N,) class, in a type as narrow as can be: numpy sorts such integers, stably, by radix.
    """
    order = which[np.argsort(-detections.score[which], kind="stable")]
    order = order[np.argsort(label[order], kind="stable")]
    score, label = detections.score[order], label[order]
    same = np.zeros(len(order), bool)  # as the one before it
    same[1:] = (score[1:] == score[:-1]) & (label[1:] == label[:-1])
    tied = np.nonzero(same | np.append(same[1:], False))[0]  # few, mostly
    if len(tied):
        place = {name: i for i, name in enumerate(sorted(set(names)))}
        each = order[tied]
        video = np.array([place[name] for name in names])[detections.video[each]]
        keys = (detections.end[each], detections.start[each], video, np.cumsum(~same)[tied])
        order[tied] = each[np.lexsort(keys)]
    return order


def _no_counts() -> dict[Reason, int]:
    return dict.fromkeys(get_args(Reason), 0)


def _chosen(names: tuple[str, ...], mask: np.ndarray) -> tuple[str, ...]:
    """The names where ``mask`` is true; it may be longer."""
    return tuple(name for name, chosen in zip(names, mask.tolist(), strict=False) if chosen)


def _check(segments: Segments, kind: str) -> None:
    numbers = [segments.start, segments.end, *([segments.score] if isinstance(segments, Detections) else [])]
    bad = ~np.isfinite(numbers).all(axis=0) | (segments.end < segments.start)
    bad |= (np.abs(numbers[:2]) > _LARGEST_TIME).any(axis=0)
    if bad.any():
        i = int(np.nonzero(bad)[0][0])
        raise InputError(
            f"{kind} {i}, in '{segments.videos[segments.video[i]]}', has start, end (and score) "
            f"{[float(x[i]) for x in numbers]}; all must be finite, times within {_LARGEST_TIME:g}, and the end not "
            "before the start: mend or drop it"
        )


def _is_ambiguous(label: str) -> bool:
    return label.strip().casefold() == "ambiguous"


def _find_prefix(detections: Detections, annotations: Annotations) -> tuple[tuple[str, ...], str]:
    """Names of the detections' videos as the annotations have them, and in words what was done to them, if anything.

    One known name is enough to leave all as they are.
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


def _join(
    names: tuple[str, ...], detections: Detections, annotations: Annotations, unknown_videos: UnknownVideos
) -> tuple[np.ndarray, np.ndarray]:
    """(N,) video and label of each detection as indices into the names of ``annotations``, past them if unknown.

    ``names`` are those of the detections' videos, from :func:`_find_prefix`.
    """
    if unknown_videos not in get_args(UnknownVideos):
        raise InputError(f"unknown_videos is '{unknown_videos}'; choose {', '.join(get_args(UnknownVideos))}")
    video = _index(names, annotations.videos)[detections.video]
    label = _index(detections.classes, annotations.classes)[detections.label]
    strange = video == len(annotations.videos)
    if unknown_videos == "error" and strange.any():
        unknown = sorted({names[v] for v in np.unique(detections.video[strange])})
        raise InputError(
            f"the annotations do not list {_count(len(unknown), 'video')} of the detections: {listed(unknown)}; "
            f"{_spelling(unknown, annotations.videos)}choose the subset that was localized, or drop what is elsewhere "
            "with --ignore-unknown-videos (in Python unknown_videos='ignore')"
        )
    unjudged = label == len(annotations.classes)
    if unknown_videos == "ignore":
        unjudged &= ~strange
    classes = [detections.classes[c] for c in np.unique(detections.label[unjudged])]
    if unknown := [c for c in classes if not _is_ambiguous(c)]:
        raise InputError(
            f"the annotations do not have {_count(len(unknown), *_CLASS)} of the detections: "
            + ", ".join(f"'{c}'{_similar(c, annotations.classes)}" for c in unknown[:3])
            + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
            + f"; they have {listed(annotations.classes, 20)}"
        )
    return video, label


def _nothing_left(dropped: dict[Reason, int], names: tuple[str, ...], annotations: Annotations) -> str:
    reasons = {
        "in videos that the annotations do not list (unknown_videos='ignore', --ignore-unknown-videos)": dropped[
            "unknown_video"
        ],
        "labelled 'Ambiguous', which is a mark and no class": dropped["ambiguous_label"],
        "in videos without a segment, which the wtalc protocol leaves out": dropped["video_without_segments"],
    }
    known = set(annotations.videos)
    unknown = sorted(name for name in names if name not in known)
    hint = _spelling(unknown, annotations.videos) if dropped["unknown_video"] else ""
    return (
        f"no detection is left to judge, all {sum(dropped.values())} are dropped: "
        + ", ".join(f"{n} {reason}" for reason, n in reasons.items() if n)
        + f"; {hint}choose the subset that was localized and detections of its classes"
    )


def _spelling(unknown: Iterable[str], known: Iterable[str]) -> str:
    """A hint, or "", where names differ only by ``v_``, the suffix of a file, case, or blanks and underscores."""

    def bare(name: str) -> str:
        return re.sub(r"[\s_-]+", "_", unicodedata.normalize("NFKC", name.removeprefix(_PREFIX))).casefold()

    def stem(name: str) -> str:
        return re.sub(r"\.[A-Za-z]\w{1,4}$", "", name)

    whole = {bare(name): name for name in known}
    stems = {bare(stem(name)): name for name in known}
    unknown = list(unknown)
    # Of two suffixes none is removed: "clip.left" is not "clip.right".
    meant = [whole.get(bare(x)) or whole.get(bare(stem(x))) or stems.get(bare(x)) for x in unknown]
    pairs = [(x, other) for x, other in zip(unknown, meant, strict=True) if other]
    if not pairs:
        return ""
    return (
        f"the detections name '{pairs[0][0]}', the annotations '{pairs[0][1]}' ({len(pairs)} of {len(unknown)} differ "
        "like that: rename them in one of the files); else "
    )


def _similar(name: str, known: tuple[str, ...]) -> str:
    """What may be meant by an unknown class, in brackets, or ""."""
    same = [other for other in known if plain(other) == plain(name)]
    if same:
        return f" (is '{same[0]}' in the annotations: rename it)"
    return did_you_mean(name, known)


def _count(n: int, one: str, many: str = "") -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"


def _index(names: tuple[str, ...], known: tuple[str, ...]) -> np.ndarray:
    position = {name: i for i, name in enumerate(known)}
    return np.array([position.get(name, len(known)) for name in names], np.int64)


def _snippets(seconds: np.ndarray) -> np.ndarray:
    return np.rint(seconds * _SNIPPETS_PER_SECOND)


def _overlaps(
    group: np.ndarray, start: np.ndarray, end: np.ndarray, other: np.ndarray, o_start: np.ndarray, o_end: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs (i, j) of one group whose intervals share more than a point, and their IoU.

    Interval i is [start, end) of ``group`` (N,), j is [o_start, o_end) of ``other`` (M,). Returns three (P,) arrays,
    ordered by i. Costs O((N + M) log M + P) unless the second intervals of a group are deeply nested.
    """
    if len(other) == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    first, last = o_start.min(), o_end.max()
    scale = 0.5 / max(last - first, np.finfo(float).tiny)

    def key(group: np.ndarray, time: np.ndarray) -> np.ndarray:
        # The group, and as its fraction the time. Rounding never swaps two times of a group, though it may make them
        # equal: such pairs are candidates below.
        return group + (time.clip(first, last) - first) * scale

    by_start = np.lexsort((o_start, other))
    key_start = key(other, o_start)[by_start]
    # Latest end so far; a later group exceeds every earlier one, so the running maximum never crosses groups.
    key_end = np.maximum.accumulate(key(other, o_end)[by_start])
    # Candidates: from the first j that may end after i starts, to the last j that starts before i ends.
    low = np.searchsorted(key_end, key(group, start))
    to = key(group, end)
    some = np.nonzero(np.append(key_start, np.inf)[low] <= to)[0]
    low = low[some]
    count = np.searchsorted(key_start, to[some], side="right") - low
    i = np.repeat(some, count)
    j = by_start[np.arange(len(i)) + np.repeat(low - np.cumsum(count) + count, count)]

    shared = np.minimum(end[i], o_end[j]) - np.maximum(start[i], o_start[j])
    real = shared > 0
    i, j, shared = i[real], j[real], shared[real]
    return i, j, shared / ((end[i] - start[i]) + (o_end[j] - o_start[j]) - shared)


def _match(det: np.ndarray, gt: np.ndarray, n_gt: int) -> np.ndarray:
    """Detections that find a ground truth: each takes the first of its pairs that is still free.

    Pairs come ordered by detection, then by its preference. Returns detection indices, rising.
    """
    # A ground truth is gone, at the latest, after the first detection that prefers it: few pairs are left to look at.
    favourite = np.diff(det, prepend=-1) > 0
    latest = np.full(n_gt, np.iinfo(np.int64).max)
    latest[gt[favourite][::-1]] = det[favourite][::-1]  # of repeated indices numpy keeps the last value
    live = det <= latest[gt]
    taken = bytearray(n_gt)
    hits: list[int] = []
    last = -1
    for d, g in zip(det[live].tolist(), gt[live].tolist(), strict=True):
        if d != last and not taken[g]:
            taken[g] = 1
            hits.append(d)
            last = d
    return np.array(hits, np.int64)


def _average_precision(hits: np.ndarray, label: np.ndarray, annotations: Annotations) -> np.ndarray:
    """(C,) AP in 0 … 1. ``hits``: rising indices of true positives; ``label``: (N,) rising, in order of rank."""
    classes = np.arange(len(annotations.classes))
    positives = np.bincount(annotations.label, minlength=len(classes))
    first = np.searchsorted(label, classes)
    ap = np.zeros(len(classes))
    for c, ranks in enumerate(np.split(hits, np.searchsorted(label[hits], classes[1:]))):
        precision = np.arange(1, len(ranks) + 1) / (ranks - first[c] + 1)
        # Every true positive is a recall step of 1 / positives, worth the best precision from there on.
        ap[c] = np.maximum.accumulate(precision[::-1]).sum() / max(positives[c], 1)
    return ap
