"""What detections are worth at a score threshold: the best F1, and which false positives stand beside a recall."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from d2net.detections import Annotations, Detections
from d2net.errors import InputError
from d2net.evaluation.errors import MIN_TIOU, VERDICTS, verdicts_of
from d2net.evaluation.matching import overlaps
from d2net.evaluation.names import UnknownVideos
from d2net.evaluation.prepare import Judged, Protocol, prepare

FalsePositive = Literal["other_class", "fragment", "boundary", "double", "background"]
FALSE_POSITIVES: tuple[FalsePositive, ...] = get_args(FalsePositive)
RECALLS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
MOSTLY, WITHIN = 0.5, 0.9  # shares of a detection


@dataclass(frozen=True)
class OperatingPoints:
    """What :func:`operating_points` found.

    Attributes:
        tiou: Temporal IoU of a match.
        f1: Largest F1 in percent over all score thresholds, over all classes together.
        f1_score: Its threshold: detections of at least this score count; None where there is no detection.
        false_positives: By recall ("0.1" … "0.9"): how many of each kind are among the detections with the highest
            scores, as many as reach that recall; None where all together do not.
    """

    tiou: float
    f1: float
    f1_score: float | None
    false_positives: dict[str, dict[str, int] | None]

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dump``."""
        return asdict(self)


def operating_points(
    detections: Detections,
    annotations: Annotations,
    protocol: Protocol = "activitynet",
    tiou: float = 0.5,
    *,
    unknown_videos: UnknownVideos = "error",
) -> OperatingPoints:
    """Take the detections of all classes by falling score, and look at every threshold.

    A false positive, which is a detection that takes no ground truth at ``tiou``, is of one of these kinds, the first
    that holds:

    ===============  ==================================================================================================
    double           the segment with which its IoU is highest is of its class, was taken, and reaches ``tiou``
    other class      the segment with which its IoU is highest, and at least 0.1, is of another class
    fragment         nine tenths of it lie within a segment of its class
    boundary         its IoU with a segment of its class is 0.1 or more, or half of it lies within one
    other class      half of it lies within a segment of another class
    background       none of these
    ===============  ==================================================================================================

    Args and Raises: as :func:`d2net.evaluation.evaluate`, but for one ``tiou``, which is at least 0.1.
    """
    if not MIN_TIOU <= tiou <= 1:
        raise InputError(f"tiou is {tiou}; kinds of false positives are told apart at one IoU from {MIN_TIOU} to 1")
    judged = prepare(detections, annotations, protocol, unknown_videos)
    hits, _ = judged.hits(judged.pairs(tiou), tiou)
    kind = _kinds(judged, hits, tiou)
    score = detections.score[judged.order]
    best_first = np.argsort(-score, kind="stable")
    score, kind = score[best_first], kind[best_first]
    # A threshold takes all detections of one score: it is where the next score is another.
    last = np.nonzero(np.append(score[1:] != score[:-1], True))[0] if len(score) else np.empty(0, np.int64)
    found = np.cumsum(kind < 0)[last]
    wanted = len(annotations)
    f1 = 100 * 2 * found / (last + 1 + wanted)
    false_positives: dict[str, dict[str, int] | None] = {}
    for recall in RECALLS:
        enough = np.nonzero(found >= recall * wanted - 1e-9)[0]
        false_positives[f"{recall:g}"] = None
        if len(enough):
            counts = np.bincount(kind[: last[enough[0]] + 1] + 1, minlength=1 + len(FALSE_POSITIVES))[1:]
            false_positives[f"{recall:g}"] = dict(zip(FALSE_POSITIVES, counts.tolist(), strict=True))
    return OperatingPoints(
        tiou=tiou,
        f1=float(f1.max()) if len(f1) else 0.0,
        f1_score=float(score[last[f1.argmax()]]) if len(f1) else None,
        false_positives=false_positives,
    )


def _kinds(judged: Judged, hits: np.ndarray, tiou: float) -> np.ndarray:
    """(N,) index into ``FALSE_POSITIVES``, or -1 for a true positive, in the order of ``judged``."""
    verdict = np.array(VERDICTS)[verdicts_of(judged, hits, tiou)]
    det, gt, _ = overlaps(judged.video, judged.start, judged.end, judged.gt_video, judged.gt_start, judged.gt_end)
    both = np.minimum(judged.end[det], judged.gt_end[gt]) - np.maximum(judged.start[det], judged.gt_start[gt])
    share = both / (judged.end[det] - judged.start[det])
    own = judged.label[det] == judged.gt_label[gt]
    within_own, within_other = np.zeros(len(verdict)), np.zeros(len(verdict))
    np.maximum.at(within_own, det[own], share[own])
    np.maximum.at(within_other, det[~own], share[~own])
    far = verdict == "background"
    kind = np.full(len(verdict), FALSE_POSITIVES.index("background"))
    for name, where in (
        ("other_class", far & (within_other >= MOSTLY)),
        ("boundary", (verdict == "localization") | (far & (within_own >= MOSTLY))),
        ("fragment", ((verdict == "localization") | far) & (within_own >= WITHIN)),
        ("other_class", (verdict == "wrong_label") | (verdict == "confusion")),
        ("double", verdict == "double_detection"),
    ):
        kind[where] = FALSE_POSITIVES.index(name)
    kind[hits] = -1
    return kind
