"""The evaluation itself, :func:`evaluate`: checks names and numbers, and computes mAP, F1 and coverage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np

from d2net.detections import Annotations, Detections, Segments
from d2net.errors import InputError
from d2net.evaluation.average_precision import average_precision
from d2net.evaluation.matching import match, overlaps, ranked
from d2net.evaluation.names import UnknownVideos, find_prefix, index, is_ambiguous, join, nothing_left
from d2net.evaluation.result import Coverage, Evaluation, Reason

Protocol = Literal["activitynet", "wtalc"]
THUMOS14_TIOU = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
ACTIVITYNET_TIOU = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
_SNIPPETS_PER_SECOND = 25 / 16
_LARGEST_TIME = 1e300  # seconds; sums of a few such times do not overflow


def evaluate(
    detections: Detections,
    annotations: Annotations,
    protocol: Protocol = "activitynet",
    tiou: float | Iterable[float] = THUMOS14_TIOU,
    f1_tiou: float = 0.5,
    *,
    unknown_videos: UnknownVideos = "error",
) -> Evaluation:
    """Compare detections with ground truth, by one of the two protocols of :mod:`d2net.evaluation`.

    AP is the area under the interpolated precision-recall curve. The order of detections, annotations and recordings
    does not change a bit of the result (:mod:`d2net.evaluation` says how ties are broken). Detections past the end of a
    recording are judged like any other. F1 = 2 TP / (2 TP + FP + FN) takes all detections as given, without a search
    for a score threshold, as in Table 3 of the paper; TP, FP and FN are summed over all classes, also those without
    ground truth.

    Detections labelled "Ambiguous" (in upper or lower case) are dropped: annotations use that as a mark, not as a
    class.

    Args:
        detections: Joined to ``annotations`` by the names of recordings and classes. Names of ActivityNet's files begin
            with ``v_``, those of its annotations do not. So if ``annotations`` knows no recording of the detections,
            but all recordings with a detection once ``v_`` is removed from their names, or added, they are renamed, and
            ``coverage.renamed`` says so.
        annotations: The ground truth.
        protocol: ``activitynet`` or ``wtalc``.
        tiou: Temporal IoU thresholds, each in (0, 1].
        f1_tiou: The IoU of the F1 score.
        unknown_videos: What to do with detections in recordings that ``annotations`` does not list: raise an ``error``,
            ``ignore`` them, or count each as a ``false_positive``, as the ActivityNet toolkit does.

    Raises:
        InputError: an unknown protocol, recording or class; a threshold outside (0, 1]; no ground truth; a time or
            score that is not finite; a segment that ends before it starts; no detection is left, because all have
            unknown recordings, the label "Ambiguous", or recordings without segments.
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
    if marks := [c for c in annotations.classes if is_ambiguous(c)]:
        raise InputError(f"the annotations have a class '{marks[0]}', which is a mark: put its rows into `ambiguous`")
    _check(annotations, "annotation")
    _check(detections, "detection")

    names, renamed = find_prefix(detections, annotations)
    video, label = join(names, detections, annotations, unknown_videos)
    start, end = detections.start, detections.end
    # Which of several ground truths a detection is matched to depends on their order.
    by_time, rank = (annotations.end, annotations.start), annotations.rank if protocol == "wtalc" else None
    offered = np.lexsort(by_time if rank is None else (*by_time, rank))
    gt_video, gt_label = annotations.video[offered], annotations.label[offered]
    gt_start, gt_end = annotations.start[offered], annotations.end[offered]

    # Arrays by recording; the last entry stands for all unknown ones.
    n_groups = len(annotations.videos) + 1
    unknown = video == n_groups - 1
    has_segment = np.bincount(annotations.video, minlength=n_groups) > 0
    judged = np.ones(n_groups, bool)
    if protocol == "wtalc":
        judged[:-1] = has_segment[:-1] | [name in annotations.withdrawn for name in annotations.videos]
    detected, listed = np.zeros(n_groups, bool), np.zeros(n_groups, bool)
    detected[video] = True
    listed[index(names, annotations.videos)] = True

    keep = np.ones(len(detections), bool)
    dropped, false_positives = _no_counts(), _no_counts()

    def drop(reason: Reason, where: np.ndarray) -> None:
        dropped[reason] = int((keep & where).sum())
        keep[where] = False

    drop("unknown_video", unknown & (unknown_videos == "ignore"))
    drop("ambiguous_label", np.array([is_ambiguous(c) for c in detections.classes], bool)[detections.label])
    drop("video_without_segments", ~judged[video])
    if len(detections) and not keep.any():
        raise InputError(nothing_left(dropped, names, annotations))
    if protocol == "wtalc":
        start, end, gt_start, gt_end = (_snippets(x) for x in (start, end, gt_start, gt_end))
        ambiguous = annotations.ambiguous
        touching, _, _ = overlaps(
            video, start, end, ambiguous[:, 0].astype(np.int64), _snippets(ambiguous[:, 1]), _snippets(ambiguous[:, 2])
        )
        touches = np.zeros(len(detections), bool)
        touches[touching] = True
        drop("ambiguous_segment", touches)
    false_positives["unknown_video"] = int((keep & unknown).sum())
    false_positives["video_without_segments"] = int((keep & ~unknown & ~has_segment[video]).sum())

    order = ranked(np.nonzero(keep)[0], detections, names, label.astype(np.min_scalar_type(len(annotations.classes))))
    video, label, start, end = video[order], label[order], start[order], end[order]

    # Only pairs that reach the lowest IoU threshold matter; a detection in no pair is a false positive.
    det, gt, iou = overlaps(label * n_groups + video, start, end, gt_label * n_groups + gt_video, gt_start, gt_end)
    near = iou >= min(*tiou, f1_tiou)
    det, gt, iou = det[near], gt[near], iou[near]
    # Pairs are ordered by detection. The pairs of one detection are now put in the order in which it tries them.
    several = np.nonzero((np.diff(det, prepend=-1) == 0) | (np.diff(det, append=-1) == 0))[0]
    d, g, v = det[several], gt[several], iou[several]
    preference = np.lexsort((g, d) if protocol == "wtalc" else (-g, -v, d))
    gt[several], iou[several] = g[preference], v[preference]

    hits = {t: match(det[iou >= t], gt[iou >= t], len(annotations)) for t in {*tiou, f1_tiou}}
    ap = 100 * np.stack([average_precision(hits[t], label, annotations) for t in tiou], axis=1)
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


def _no_counts() -> dict[Reason, int]:
    return dict.fromkeys(get_args(Reason), 0)


def _chosen(names: tuple[str, ...], mask: np.ndarray) -> tuple[str, ...]:
    """The names where ``mask`` is true; ``mask`` may be longer than ``names``."""
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
            "before the start: correct or drop it"
        )


def _snippets(seconds: np.ndarray) -> np.ndarray:
    return np.rint(seconds * _SNIPPETS_PER_SECOND)
