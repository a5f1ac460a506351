"""Which errors keep the mAP low: :func:`analyse_errors`, after DETAD (Alwassel et al., ECCV 2018)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from d2net.detections import Annotations, Detections
from d2net.errors import InputError
from d2net.evaluation.average_precision import average_precision
from d2net.evaluation.matching import overlaps
from d2net.evaluation.names import UnknownVideos
from d2net.evaluation.prepare import Judged, Protocol, prepare

Verdict = Literal["true_positive", "double_detection", "wrong_label", "localization", "confusion", "background"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
SLICES = 10  # the best 1 G, …, 10 G detections of each class
MIN_TIOU = 0.1  # below which a detection has nothing to do with a ground truth


@dataclass(frozen=True)
class ErrorAnalysis:
    """What :func:`analyse_errors` found; its docstring says what each verdict is.

    Attributes:
        protocol: ``activitynet`` or ``wtalc``.
        tiou: Temporal IoU of a match.
        verdict: (N,) int8, index into ``VERDICTS`` of each detection as given; -1: dropped, as under the protocol.
        counts: (10, 6) int64, how many of each verdict there are among the g-th G detections of all classes, G being
            the number of a class's ground truths: row 0 is the best G, row 9 those of ranks 9 G + 1 to 10 G.
        map: mAP at ``tiou`` in percent, of all detections that count.
        gain: Points of mAP that each kind of error costs: "missed", and the verdicts but ``true_positive``.
        missed: Ground truths that no detection finds.
        ground_truth: All of them.
    """

    protocol: str
    tiou: float
    verdict: np.ndarray
    counts: np.ndarray
    map: float
    gain: dict[str, float]
    missed: int
    ground_truth: int

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dump``: ``counts`` by verdict, over the ten slices."""
        return {
            "tiou": self.tiou,
            "min_tiou": MIN_TIOU,
            "map": self.map,
            "counts": {name: self.counts[:, i].tolist() for i, name in enumerate(VERDICTS)},
            "missed": self.missed,
            "ground_truth": self.ground_truth,
            "gain": self.gain,
        }


def error_level(tiou: Iterable[float]) -> float | None:
    """Of the IoUs of an evaluation the one for :func:`analyse_errors`: the nearest to 0.5; None: all are too low."""
    return min((t for t in tiou if t >= MIN_TIOU), key=lambda t: (abs(t - 0.5), t), default=None)


def analyse_errors(
    detections: Detections,
    annotations: Annotations,
    protocol: Protocol = "activitynet",
    tiou: float = 0.5,
    *,
    unknown_videos: UnknownVideos = "error",
) -> ErrorAnalysis:
    """Say of every detection what is wrong with it, and what each kind of error costs.

    A detection that takes a ground truth at ``tiou``, as in :func:`d2net.evaluation.evaluate`, is a true positive. The
    verdict on any other depends on the ground truth of its recording, of whatever class, with which its IoU is
    highest (of equal ones that of its own class):

    ================  =============================  =========================
    IoU               of its own class               of another class
    ================  =============================  =========================
    ``tiou`` or more  double detection (it is taken) wrong label
    0.1 to ``tiou``   localization (wrong boundary)  confusion (both are wrong)
    below 0.1         background                     background
    ================  =============================  =========================

    These are DETAD's definitions, and as there ``counts`` are of the 10 G best detections of each class, G being the
    number of its ground truths. The gain of a kind is the mAP at ``tiou`` once all detections of that verdict are
    removed, minus the mAP; that of "missed" once the ground truths are removed that no detection takes (a class of
    which none is left keeps AP 0). Gains do not add up. Unlike DETAD: mAP and gains are of all detections instead of
    the 10 G best, and of the usual AP instead of one with a precision that is normalised by the mean number of ground
    truths a class, so that mAP here is mAP there; "missed" has a gain too. Under ``wtalc`` IoUs are those of ranges of
    snippets, and matches those of that protocol.

    Args and Raises: as :func:`d2net.evaluation.evaluate`, but for one ``tiou``, which is at least 0.1.
    """
    if not MIN_TIOU <= tiou <= 1:
        raise InputError(f"tiou is {tiou}; errors are told apart at one IoU from {MIN_TIOU} to 1: give such a number")
    judged = prepare(detections, annotations, protocol, unknown_videos)
    hits, taken = judged.hits(judged.pairs(tiou), tiou)
    verdict = verdicts_of(judged, hits, tiou)
    positives = judged.positives()

    def mean_ap(keep: np.ndarray, ground_truths: np.ndarray) -> float:
        kept = np.cumsum(keep) - 1  # index of each detection among those that are kept, as all hits are
        ap = average_precision(kept[hits], judged.label[keep], ground_truths)
        return float(100 * ap[positives > 0].mean())

    everything = np.ones(len(verdict), bool)
    found = np.bincount(judged.gt_label[taken], minlength=len(positives))
    now = mean_ap(everything, positives)
    gain: dict[str, float] = {name: mean_ap(verdict != i, positives) - now for i, name in enumerate(VERDICTS) if i > 0}
    gain["missed"] = mean_ap(everything, found) - now

    # Rank within the class, in units of its ground truths; classes without any have no top.
    rank = np.arange(len(verdict)) - np.searchsorted(judged.label, judged.label)
    slice_of = rank // np.maximum(positives[judged.label], 1)
    top = (positives[judged.label] > 0) & (slice_of < SLICES)
    counts = np.zeros((SLICES, len(VERDICTS)), np.int64)
    np.add.at(counts, (slice_of[top], verdict[top]), 1)

    given = np.full(len(detections), -1, np.int8)
    given[judged.order] = verdict
    return ErrorAnalysis(
        protocol=protocol,
        tiou=float(tiou),
        verdict=given,
        counts=counts,
        map=now,
        gain=gain,
        missed=len(annotations) - len(taken),
        ground_truth=len(annotations),
    )


def verdicts_of(judged: Judged, hits: np.ndarray, tiou: float) -> np.ndarray:
    """(N,) indices into ``VERDICTS``, in the order of ``judged``."""
    det, gt, iou = overlaps(judged.video, judged.start, judged.end, judged.gt_video, judged.gt_start, judged.gt_end)
    own = judged.label[det] == judged.gt_label[gt]
    best = np.lexsort((own, iou, det))  # the best pair of each detection is its last
    best = best[np.diff(det[best], append=-1) != 0]
    det, iou, own = det[best], iou[best], own[best]
    verdict = np.full(len(judged.order), VERDICTS.index("background"))
    for name, where in (
        ("double_detection", own & (iou >= tiou)),
        ("wrong_label", ~own & (iou >= tiou)),
        ("localization", own & (iou < tiou) & (iou >= MIN_TIOU)),
        ("confusion", ~own & (iou < tiou) & (iou >= MIN_TIOU)),
    ):
        verdict[det[where]] = VERDICTS.index(name)
    verdict[hits] = VERDICTS.index("true_positive")
    return verdict
