"""Which detections find a ground truth: their order, the pairs that overlap in time, and who takes whom."""

from __future__ import annotations

import numpy as np

from d2net.detections import Detections


def ranked(which: np.ndarray, detections: Detections, names: tuple[str, ...], label: np.ndarray) -> np.ndarray:
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


def overlaps(
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


def match(det: np.ndarray, gt: np.ndarray, n_gt: int) -> tuple[np.ndarray, np.ndarray]:
    """Detections that find a ground truth: each takes the first of its pairs that is still free.

    Pairs come ordered by detection, then by its preference. Returns detection indices, rising, and what each took.
    """
    # A ground truth is gone, at the latest, after the first detection that prefers it: few pairs are left to look at.
    favourite = np.diff(det, prepend=-1) > 0
    latest = np.full(n_gt, np.iinfo(np.int64).max)
    latest[gt[favourite][::-1]] = det[favourite][::-1]  # of repeated indices numpy keeps the last value
    live = det <= latest[gt]
    taken = bytearray(n_gt)
    hits: list[int] = []
    took: list[int] = []
    last = -1
    for d, g in zip(det[live].tolist(), gt[live].tolist(), strict=True):
        if d != last and not taken[g]:
            taken[g] = 1
            hits.append(d)
            took.append(g)
            last = d
    return np.array(hits, np.int64), np.array(took, np.int64)
