"""Mean average precision and F1 of detections, under the two protocols of the field.

``activitynet``: time is continuous; detections of a class by falling score, each takes the unmatched ground truth
with the highest IoU among those that reach the threshold (of equal IoUs the later one, as in the ActivityNet toolkit).

``wtalc``: the frame-discretised protocol of the W-TALC family. Times become snippet indices, round(s * 25 / 16),
half to even, and IoU is that of index ranges; each detection takes the first unmatched ground truth, in the order
of the annotations, that reaches the threshold. Detections touching an ambiguous segment (of any class) do not count.

Under both, detections in a video without ground truth are false positives.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from d2net.detections import Annotations, Detections, Segments
from d2net.errors import InputError

Protocol = Literal["activitynet", "wtalc"]
UnknownVideos = Literal["error", "ignore", "false_positive"]
THUMOS14_TIOU = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
ACTIVITYNET_TIOU = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
_SNIPPETS_PER_SECOND = 25 / 16


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found. Everything but ``tiou`` is in percent.

    Attributes:
        protocol: ``activitynet`` or ``wtalc``.
        tiou: The N temporal IoU thresholds.
        map: (N,) float64, mean AP over the classes that have ground truth.
        average: Mean of ``map``.
        f1: F1 at the IoU ``f1_tiou`` of all detections as given, over all classes.
        per_class: AP of each class that has ground truth, one number a threshold.
    """

    protocol: str
    tiou: tuple[float, ...]
    map: np.ndarray
    average: float
    f1: float
    per_class: dict[str, list[float]]

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dump``; ``map`` by IoU, ``{"0.5": 36.0}``."""
        return {
            "protocol": self.protocol,
            "map": {f"{t:g}": float(m) for t, m in zip(self.tiou, self.map, strict=True)},
            "average": self.average,
            "f1": self.f1,
            "per_class": self.per_class,
        }


def evaluate(
    detections: Detections,
    annotations: Annotations,
    protocol: Protocol = "activitynet",
    tiou: Iterable[float] = THUMOS14_TIOU,
    f1_tiou: float = 0.5,
    *,
    unknown_videos: UnknownVideos = "error",
) -> Evaluation:
    """Compare detections with ground truth (module docstring: the two protocols).

    AP is the area under the interpolated precision-recall curve; a class without detections has AP 0. Detections of
    equal score keep their order. F1 = 2 TP / (2 TP + FP + FN) takes the detections as retained, without a search for
    a score threshold, as in Table 3 of the paper; TP, FP and FN are summed over all classes.

    Args:
        detections, annotations: Joined by the names of their videos and classes.
        tiou: Temporal IoU thresholds, each in (0, 1].
        f1_tiou: The IoU of the F1 score.
        unknown_videos: What detections in videos that ``annotations`` does not list are: an ``error``, nothing
            (``ignore``), or each a ``false_positive`` (what the ActivityNet toolkit does).

    Raises:
        InputError: unknown protocol, video or class; a threshold outside (0, 1]; no ground truth; a time or score
            that is not finite; a segment that ends before it starts.
    """
    tiou = tuple(float(t) for t in tiou)
    if protocol not in get_args(Protocol):
        raise InputError(f"protocol '{protocol}' is unknown; choose activitynet or wtalc")
    if not tiou or not all(0 < t <= 1 for t in (*tiou, f1_tiou)):
        raise InputError(f"IoU thresholds {[*tiou]} and {f1_tiou} for F1: give at least one, each above 0 and up to 1")
    if len(annotations) == 0:
        raise InputError("the annotations hold no segment; choose a subset that has ground truth")
    _check(annotations, "annotation")
    _check(detections, "detection")

    video, label = _join(detections, annotations, unknown_videos)
    start, end, score = detections.start, detections.end, detections.score
    gt_start, gt_end = annotations.start, annotations.end
    n_videos = len(annotations.videos)
    keep = (video < n_videos) | (unknown_videos == "false_positive")
    if protocol == "wtalc":
        start, end, gt_start, gt_end = (_snippets(x) for x in (start, end, gt_start, gt_end))
        ambiguous = annotations.ambiguous
        touching, _, _ = _overlaps(
            video, start, end, ambiguous[:, 0].astype(np.int64), _snippets(ambiguous[:, 1]), _snippets(ambiguous[:, 2])
        )
        keep[touching] = False

    # Detections by class, then by falling score; numpy sorts narrow integers, stably, by radix.
    order = np.nonzero(keep)[0]
    order = order[np.argsort(-score[order], kind="stable")]
    order = order[np.argsort(label[order].astype(np.min_scalar_type(len(annotations.classes))), kind="stable")]
    video, label, start, end = video[order], label[order], start[order], end[order]

    # Only pairs that reach the lowest IoU matter; a detection in none of them is a false positive.
    n_groups = n_videos + 1  # one more for all unknown videos
    det, gt, iou = _overlaps(
        label * n_groups + video, start, end, annotations.label * n_groups + annotations.video, gt_start, gt_end
    )
    near = iou >= min(*tiou, f1_tiou)
    det, gt, iou = det[near], gt[near], iou[near]
    # Pairs are ordered by detection; those of a detection with several now by its preference.
    several = np.nonzero((np.diff(det, prepend=-1) == 0) | (np.diff(det, append=-1) == 0))[0]
    d, g, v = det[several], gt[several], iou[several]
    preference = np.lexsort((g, d) if protocol == "wtalc" else (-g, -v, d))
    gt[several], iou[several] = g[preference], v[preference]

    hits = {t: _match(det[iou >= t], gt[iou >= t], len(annotations)) for t in {*tiou, f1_tiou}}
    ap = 100 * np.stack([_average_precision(hits[t], label, annotations) for t in tiou], axis=1)
    present = np.unique(annotations.label)
    mean = ap[present].mean(axis=0)
    return Evaluation(
        protocol=protocol,
        tiou=tiou,
        map=mean,
        average=float(mean.mean()),
        # 2 TP + FP + FN is the number of detections plus the number of ground truths.
        f1=100 * 2 * len(hits[f1_tiou]) / (len(order) + len(annotations)),
        per_class={annotations.classes[c]: ap[c].tolist() for c in present},
    )


def _check(segments: Segments, kind: str) -> None:
    numbers = [segments.start, segments.end, *([segments.score] if isinstance(segments, Detections) else [])]
    bad = ~np.isfinite(numbers).all(axis=0) | (segments.end < segments.start)
    if bad.any():
        i = int(np.nonzero(bad)[0][0])
        raise InputError(
            f"{kind} {i}, in '{segments.videos[segments.video[i]]}', has start, end (and score) "
            f"{[float(x[i]) for x in numbers]}; all must be finite and the end not before the start: mend or drop it"
        )


def _join(
    detections: Detections, annotations: Annotations, unknown_videos: UnknownVideos
) -> tuple[np.ndarray, np.ndarray]:
    """(N,) video and label of each detection as indices into the names of ``annotations``, past them if unknown."""
    if unknown_videos not in get_args(UnknownVideos):
        raise InputError(f"unknown_videos is '{unknown_videos}'; choose {', '.join(get_args(UnknownVideos))}")
    video = _index(detections.videos, annotations.videos)[detections.video]
    label = _index(detections.classes, annotations.classes)[detections.label]
    strange = video == len(annotations.videos)
    if unknown_videos == "error" and strange.any():
        names = {detections.videos[v] for v in np.unique(detections.video[strange])}
        raise InputError(
            f"detections in video '{min(names)}' (unknown videos: {len(names)}), which the annotations do not list; "
            "choose the subset that was localized, or set unknown_videos to ignore or false_positive"
        )
    unknown = label == len(annotations.classes)
    if unknown_videos == "ignore":
        unknown &= ~strange
    if unknown.any():
        names = {detections.classes[c] for c in np.unique(detections.label[unknown])}
        raise InputError(
            f"detections of class '{min(names)}' (unknown classes: {len(names)}), which the annotations do not have; "
            "there are " + ", ".join(annotations.classes)
        )
    return video, label


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
