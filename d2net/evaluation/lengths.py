"""AP and recall by the length of the ground truth, XS to XL, after DETAD: :func:`analyse_lengths`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from d2net.detections import Annotations, Detections
from d2net.errors import InputError
from d2net.evaluation.levels import THUMOS14_TIOU, check_tiou
from d2net.evaluation.names import UnknownVideos
from d2net.evaluation.prepare import Judged, Protocol, prepare

LENGTHS = ("XS", "S", "M", "L", "XL", "all")
# Seconds up to which a segment is XS, S, M and L: DETAD's, of its two datasets.
THUMOS14_LENGTHS = (3.0, 6.0, 12.0, 18.0)
ACTIVITYNET_LENGTHS = (30.0, 60.0, 120.0, 180.0)


@dataclass(frozen=True)
class LengthAnalysis:
    """What :func:`analyse_lengths` found. Rows are ``LENGTHS``: the five lengths and all ground truth.

    Attributes:
        protocol: ``activitynet`` or ``wtalc``.
        tiou: The N temporal IoUs.
        bounds: Seconds up to which a ground truth is XS, S, M and L; longer ones are XL.
        ground_truth: (6,) how many there are.
        map_n: (6, N) mAP_N in percent; NaN where there is no ground truth.
        recall: (6, N) share of the ground truths that a detection takes, in percent; NaN where there is none.
    """

    protocol: str
    tiou: tuple[float, ...]
    bounds: tuple[float, float, float, float]
    ground_truth: np.ndarray
    map_n: np.ndarray
    recall: np.ndarray

    def seconds(self) -> list[str]:
        """Of each row which lengths it holds: "0-3 s", the upper bound among them."""
        a, b, c, d = (f"{bound:g}" for bound in self.bounds)
        return [f"0-{a} s", f"{a}-{b} s", f"{b}-{c} s", f"{c}-{d} s", f"over {d} s", ""]

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dump``: a dict of each row, numbers by IoU, None where there is no ground truth."""
        rows = zip(LENGTHS, self.ground_truth.tolist(), self.map_n, self.recall, strict=True)
        return {
            "bounds": list(self.bounds),
            "rows": [
                {
                    "length": name,
                    "ground_truth": n,
                    "map_n": self._by_level(map_n),
                    "average_map_n": _number(map_n.mean()),
                    "recall": self._by_level(recall),
                    "average_recall": _number(recall.mean()),
                }
                for name, n, map_n, recall in rows
            ],
        }

    def _by_level(self, values: np.ndarray) -> dict[str, float | None]:
        return {f"{t:g}": _number(v) for t, v in zip(self.tiou, values, strict=True)}


def analyse_lengths(
    detections: Detections,
    annotations: Annotations,
    protocol: Protocol = "activitynet",
    tiou: float | Iterable[float] = THUMOS14_TIOU,
    bounds: Sequence[float] | None = None,
    *,
    unknown_videos: UnknownVideos = "error",
) -> LengthAnalysis:
    """How well short and long ground truths are found.

    Matches are those of :func:`d2net.evaluation.evaluate`, of all ground truths together. The numbers of one length are
    of its ground truths: a detection that takes one of another length is left out, one that takes none is a false
    positive at every length. So that they can be compared, precision is normalised, as DETAD does (Alwassel et al.,
    ECCV 2018, "average-mAP_N"): the number of true positives is recall times the mean number of ground truths of a
    class, of all lengths, instead of what it is. mAP_N is the mean over the classes with ground truth of that length.
    It is no number to compare with mAP; "all" has it of all ground truths.

    Args:
        detections: As :func:`d2net.evaluation.evaluate` takes them.
        annotations: The ground truth.
        protocol: Of the matches. Lengths are in seconds under ``wtalc`` too.
        tiou: Temporal IoUs.
        bounds: Four rising numbers of seconds up to which, and with which, a ground truth is XS, S, M and L. None:
            DETAD's for THUMOS14 (3, 6, 12, 18) where the median length is at most 18 s, else DETAD's for ActivityNet
            (30, 60, 120, 180).
        unknown_videos: As there.

    Raises:
        InputError: as :func:`d2net.evaluation.evaluate`; bounds that are not as said.
    """
    tiou = check_tiou(tiou)
    judged = prepare(detections, annotations, protocol, unknown_videos)
    seconds = (annotations.end - annotations.start)[judged.gt_order]
    if bounds is None:
        bounds = THUMOS14_LENGTHS if np.median(seconds) <= THUMOS14_LENGTHS[-1] else ACTIVITYNET_LENGTHS
    a, b, c, d = _check_bounds(bounds)
    length = np.searchsorted((a, b, c, d), seconds)
    positives = judged.positives()
    mean_positives = len(judged.gt_label) / (positives > 0).sum()

    rows = [*(length == i for i in range(5)), np.ones(len(length), bool)]
    map_n, recall = np.full((2, len(rows), len(tiou)), np.nan)
    pairs = judged.pairs(min(tiou))
    for column, t in enumerate(tiou):
        hits, taken = judged.hits(pairs, t)
        for row, its in enumerate(rows):
            if its.any():
                map_n[row, column] = 100 * _map_n(judged, hits, its[taken], its, mean_positives)
                recall[row, column] = 100 * its[taken].sum() / its.sum()
    counts = np.array([its.sum() for its in rows])
    return LengthAnalysis(protocol, tiou, (a, b, c, d), counts, map_n, recall)


def _map_n(judged: Judged, hits: np.ndarray, own: np.ndarray, its: np.ndarray, mean_positives: float) -> float:
    """Mean, over the classes that have some of the ground truths, of their AP with normalised precision.

    Args:
        judged: All that is judged.
        hits: Detections that take a ground truth, rising.
        own: Which of these take one of those looked at; the others are left out.
        its: (M,) which ground truths are looked at.
        mean_positives: Mean number of ground truths of a class.
    """
    positives = np.bincount(judged.gt_label[its], minlength=len(judged.annotations.classes))
    ap = []
    for c in np.nonzero(positives)[0]:
        first, end = np.searchsorted(judged.label, [c, c + 1])
        of_class = slice(*np.searchsorted(hits, [first, end]))
        ranks, counted = hits[of_class] - first, own[of_class]
        # Before a hit, all detections of its class that are no hits themselves are false positives.
        false = (ranks - np.arange(len(ranks)))[counted]
        true = np.arange(1, len(false) + 1) / positives[c] * mean_positives
        precision = true / (true + false)
        ap.append(np.maximum.accumulate(precision[::-1]).sum() / positives[c])
    return math.fsum(ap) / len(ap)


def _check_bounds(bounds: Sequence[float]) -> tuple[float, float, float, float]:
    numbers = tuple(float(bound) for bound in bounds)
    if len(numbers) != 4 or not all(x < y < math.inf for x, y in zip((0.0, *numbers), numbers, strict=False)):
        raise InputError(f"bounds are {list(numbers)}; give four rising numbers of seconds above 0, as (3, 6, 12, 18)")
    a, b, c, d = numbers
    return a, b, c, d


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
