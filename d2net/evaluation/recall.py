"""Average recall at an average number of detections a recording, AR@AN: :func:`average_recall`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from d2net.detections import Annotations, Detections
from d2net.errors import InputError
from d2net.evaluation.levels import ACTIVITYNET_TIOU, check_tiou, span
from d2net.evaluation.matching import overlaps
from d2net.evaluation.names import UnknownVideos
from d2net.evaluation.prepare import Judged, Protocol, prepare

POINTS = 100  # of the curve, evenly spaced in AN
SHOWN = (1, 5, 10, 50, 100)  # the points that are printed, in percent of the largest AN
LARGEST_AN = 1_000_000


@dataclass(frozen=True)
class AverageRecall:
    """What :func:`average_recall` found; its docstring says how. Recall in percent.

    Attributes:
        protocol: ``activitynet`` or ``wtalc``.
        tiou: The N temporal IoUs that recall is averaged over.
        an: (100,) average numbers of detections a recording: 1 to 100 % of the largest.
        recall: (N, 100) recall at each IoU and AN.
        average: (100,) its mean over the IoUs: AR at each AN.
        auc: Area under ``average`` over ``an``, divided by the largest AN.
        per_recording: Detections a recording with ground truth. Above it AN is larger than what there is, and AR that
            of all detections.
    """

    protocol: str
    tiou: tuple[float, ...]
    an: np.ndarray
    recall: np.ndarray
    average: np.ndarray
    auc: float
    per_recording: float

    def shown(self) -> dict[str, float]:
        """AR at the ANs that tables show, 1, 5, 10, 50 and 100 where the largest is 100; by AN."""
        return {f"{self.an[i - 1]:g}": float(self.average[i - 1]) for i in SHOWN}

    def line(self) -> str:
        """All of it in a line to print."""
        numbers = ", ".join(f"AR@{an} {ar:.1f}" for an, ar in self.shown().items())
        return (
            f"average recall at N detections a recording, of any class, IoU {span(self.tiou)}: {numbers}; "
            f"AUC {self.auc:.1f} (there are {self.per_recording:.1f} a recording)"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dump``; ``ar`` by AN, ``{"10": 36.0}``."""
        return {
            "tiou": list(self.tiou),
            "ar": self.shown(),
            "auc": self.auc,
            "detections_per_recording": self.per_recording,
        }


def average_recall(
    detections: Detections,
    annotations: Annotations,
    protocol: Protocol = "activitynet",
    tiou: float | Iterable[float] = ACTIVITYNET_TIOU,
    max_an: float = 100,
    *,
    unknown_videos: UnknownVideos = "error",
) -> AverageRecall:
    """How much ground truth detections of whatever class touch well enough, over how many of them are looked at.

    As the ActivityNet toolkit's evaluation of proposals (Evaluation/eval_proposal.py) defines it. The detections of a
    recording are taken by falling score, whatever their class. A ground truth is found at an IoU if any of those looked
    at reaches it; one detection may find several. Recall is the share of ground truths that is found, of all recordings
    together. How many are looked at follows the number that each recording has: at an average number AN of V recordings
    with ground truth and N detections a recording with n of them gives floor(n AN V / N), at most all. (In two steps,
    the first to ``max_an``, each rounded down.) Where N is less than AN V, all detections are looked at. N counts
    detections in recordings without ground truth too.

    Args:
        detections: As :func:`d2net.evaluation.evaluate` takes them; labels matter only as it demands known ones.
        annotations: The ground truth.
        protocol: What counts, and how time is measured: ``wtalc`` drops what it drops and takes ranges of snippets.
        tiou: Temporal IoUs that recall is averaged over; default: 0.5, 0.55, …, 0.95, as on ActivityNet.
        max_an: The largest AN; the curve has 100 points up to it.
        unknown_videos: As there.

    Raises:
        InputError: as :func:`d2net.evaluation.evaluate`; a ``max_an`` that is not above 0 and at most a million.
    """
    tiou = check_tiou(tiou)
    if not 0 < max_an <= LARGEST_AN:
        raise InputError(f"max_an is {max_an}; give a number above 0 and at most {LARGEST_AN:,}")
    judged = prepare(detections, annotations, protocol, unknown_videos)
    recordings = np.unique(judged.gt_video)
    n_videos = len(annotations.videos) + 1
    has = np.bincount(judged.video, minlength=n_videos)
    looked_at = np.zeros((n_videos, POINTS), np.int64)
    looked_at[recordings] = _looked_at(has[recordings], len(judged.video), max_an)
    # Found is what one of the detections that are looked at finds: the first that does is among them.
    firsts = _first_that_finds(judged, detections.score[judged.order], tiou)
    recall = 100 * np.stack([(first[:, None] < looked_at[judged.gt_video]).mean(axis=0) for first in firsts])
    an = np.arange(1, POINTS + 1) / POINTS * max_an
    average = recall.mean(axis=0)
    return AverageRecall(
        protocol=protocol,
        tiou=tiou,
        an=an,
        recall=recall,
        average=average,
        auc=float(((average[1:] + average[:-1]) / 2 * np.diff(an)).sum() / an[-1]),
        per_recording=float(has[recordings].sum() / len(recordings)),
    )


def _looked_at(has: np.ndarray, detections: int, max_an: float) -> np.ndarray:
    """(V, 100) how many detections of each recording are looked at, in the toolkit's own arithmetic.

    Args:
        has: (V,) detections of each recording with ground truth.
        detections: Of all recordings.
        max_an: The largest AN.
    """
    kept = np.minimum((has * (max_an * len(has) / max(detections, 1))).astype(np.int64), has)
    shares = np.arange(1, POINTS + 1) / POINTS * (max_an * len(has) / max(kept.sum(), 1))
    return np.minimum((kept[:, None] * shares).astype(np.int64), kept[:, None])


def _first_that_finds(judged: Judged, score: np.ndarray, tiou: tuple[float, ...]) -> list[np.ndarray]:
    """At each IoU (M,) the rank, within its recording, of the first detection that reaches it with a ground truth."""
    order = np.lexsort((judged.end, judged.start, -score, judged.video))
    video = judged.video[order]
    rank = np.arange(len(order)) - np.searchsorted(video, video)
    found = overlaps(video, judged.start[order], judged.end[order], judged.gt_video, judged.gt_start, judged.gt_end)
    firsts = []
    for t in tiou:
        near = found[2] >= t
        first = np.full(len(judged.gt_video), np.iinfo(np.int64).max)
        np.minimum.at(first, found[1][near], rank[found[0][near]])
        firsts.append(first)
    return firsts
