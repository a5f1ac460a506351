"""The area under the interpolated precision-recall curve."""

from __future__ import annotations

import numpy as np


def average_precision(hits: np.ndarray, label: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """(C,) AP in 0 … 1.

    Args:
        hits: Indices of the detections that are true positives, rising.
        label: (N,) classes of the detections, which are ordered by class and, within a class, by falling score.
        positives: (C,) number of ground truths of each class.
    """
    classes = np.arange(len(positives))
    first = np.searchsorted(label, classes)
    ap = np.zeros(len(classes))
    for c, ranks in enumerate(np.split(hits, np.searchsorted(label[hits], classes[1:]))):
        precision = np.arange(1, len(ranks) + 1) / (ranks - first[c] + 1)
        # Every true positive is a recall step of 1 / positives, worth the best precision from there on.
        ap[c] = np.maximum.accumulate(precision[::-1]).sum() / max(positives[c], 1)
    return ap
