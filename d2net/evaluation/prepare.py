"""What is judged: detections that count, by rank, and ground truth in the order in which it is offered to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from d2net.detections import Annotations, Detections, Segments
from d2net.errors import InputError
from d2net.evaluation.matching import match, overlaps, ranked
from d2net.evaluation.names import UnknownVideos, find_prefix, index, is_ambiguous, join, nothing_left
from d2net.evaluation.result import Coverage, Reason

Protocol = Literal["activitynet", "wtalc"]
_SNIPPETS_PER_SECOND = 25 / 16
_LARGEST_TIME = 1e300  # seconds; sums of a few such times do not overflow


@dataclass(frozen=True)
class Judged:
    """The N detections that count and the M ground truths, joined under a protocol.

    Times are seconds, or snippet indices under ``wtalc``. Videos are indices into those of the annotations, and one
    more for all unknown ones.

    Attributes:
        annotations: As they were given.
        protocol: ``activitynet`` or ``wtalc``.
        order: (N,) index of each detection among those given; by class, then as ``ranked`` says.
        video: (N,) of the detections, in that order.
        label: (N,) the same of their classes.
        start: (N,) the same of their beginnings.
        end: (N,) the same of their ends.
        gt_order: (M,) index of each ground truth among those given; in the order in which they are offered.
        gt_video: (M,) of the ground truths, in that order.
        gt_label: (M,) the same of their classes.
        gt_start: (M,) the same of their beginnings.
        gt_end: (M,) the same of their ends.
        coverage: What was left out and missed.
    """

    annotations: Annotations
    protocol: Protocol
    order: np.ndarray
    video: np.ndarray
    label: np.ndarray
    start: np.ndarray
    end: np.ndarray
    gt_order: np.ndarray
    gt_video: np.ndarray
    gt_label: np.ndarray
    gt_start: np.ndarray
    gt_end: np.ndarray
    coverage: Coverage

    def positives(self) -> np.ndarray:
        """(C,) ground truths of each class."""
        return np.bincount(self.gt_label, minlength=len(self.annotations.classes))

    def pairs(self, tiou: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Detection, ground truth and IoU of all pairs of one video and class whose IoU reaches ``tiou``.

        Ordered by detection; those of one with several by its preference.
        """
        n_groups = len(self.annotations.videos) + 1
        det, gt, iou = overlaps(
            self.label * n_groups + self.video,
            self.start,
            self.end,
            self.gt_label * n_groups + self.gt_video,
            self.gt_start,
            self.gt_end,
        )
        near = iou >= tiou
        det, gt, iou = det[near], gt[near], iou[near]
        # Pairs are ordered by detection; those of a detection with several now by its preference.
        several = np.nonzero((np.diff(det, prepend=-1) == 0) | (np.diff(det, append=-1) == 0))[0]
        d, g, v = det[several], gt[several], iou[several]
        preference = np.lexsort((g, d) if self.protocol == "wtalc" else (-g, -v, d))
        gt[several], iou[several] = g[preference], v[preference]
        return det, gt, iou

    def hits(self, pairs: tuple[np.ndarray, np.ndarray, np.ndarray], tiou: float) -> tuple[np.ndarray, np.ndarray]:
        """Detections, rising, that find a ground truth at this IoU, and which; ``pairs`` reach it or a lower one."""
        det, gt, iou = pairs
        return match(det[iou >= tiou], gt[iou >= tiou], len(self.gt_label))


def prepare(
    detections: Detections, annotations: Annotations, protocol: Protocol, unknown_videos: UnknownVideos
) -> Judged:
    """Join detections to annotations, drop what does not count, and rank the rest; arguments and errors are those of
    :func:`d2net.evaluation.evaluate`."""
    if protocol not in get_args(Protocol):
        raise InputError(f"protocol '{protocol}' is unknown; choose activitynet or wtalc")
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
    n_classes = len(annotations.classes)
    present = np.bincount(annotations.label, minlength=n_classes) > 0
    coverage = Coverage(
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
            annotations.classes, present & (np.bincount(label, minlength=n_classes) == 0)
        ),
        ambiguous_segments=len(annotations.ambiguous),
    )
    return Judged(
        annotations, protocol, order, video, label, start, end, offered, gt_video, gt_label, gt_start, gt_end, coverage
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
            "before the start: mend or drop it"
        )


def _snippets(seconds: np.ndarray) -> np.ndarray:
    return np.rint(seconds * _SNIPPETS_PER_SECOND)
