"""The evaluation itself, :func:`evaluate`: checks names and numbers, and computes mAP, F1 and coverage."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from d2net.detections import Annotations, Detections
from d2net.errors import InputError
from d2net.evaluation.average_precision import average_precision
from d2net.evaluation.levels import THUMOS14_TIOU, check_tiou
from d2net.evaluation.names import UnknownVideos
from d2net.evaluation.prepare import Protocol, prepare
from d2net.evaluation.result import Evaluation


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
    tiou = check_tiou(tiou)
    if not 0 < f1_tiou <= 1:
        raise InputError(f"f1_tiou is {f1_tiou}; give an IoU threshold above 0 and up to 1")
    judged = prepare(detections, annotations, protocol, unknown_videos)
    pairs = judged.pairs(min(*tiou, f1_tiou))
    hits = {t: judged.hits(pairs, t)[0] for t in {*tiou, f1_tiou}}
    positives = judged.positives()
    ap = 100 * np.stack([average_precision(hits[t], judged.label, positives) for t in tiou], axis=1)
    present = positives > 0
    mean = ap[present].mean(axis=0)
    return Evaluation(
        protocol=protocol,
        tiou=tiou,
        map=mean,
        average=float(mean.mean()),
        # 2 TP + FP + FN is the number of detections plus the number of ground truths.
        f1=100 * 2 * len(hits[f1_tiou]) / (len(judged.order) + len(annotations)),
        per_class={annotations.classes[c]: ap[c].tolist() for c in np.nonzero(present)[0]},
        coverage=judged.coverage,
    )
