"""Matches detections to ground truth: the order of detections, pairs that overlap in time, and the matching."""

from __future__ import annotations

import numpy as np

from d2net.detections import Detections


def ranked(which: np.ndarray, detections: Detections, names: tuple[str, ...], label: np.ndarray) -> np.ndarray:
    """Indices of detections by class, then by falling score, then by recording, start and end.

    Args:
        which: The indices to order.
        detections: All detections.
        names: Of the detections' recordings, as the annotations have them.
        label: (N,) classes, in a narrow integer type, for which numpy's stable sort is a fast radix sort.
    """
    order = which[np.argsort(-detections.score[which], kind="stable")]
    order = order[np.argsort(label[order], kind="stable")]
    score, label = detections.score[order], label[order]
    same = np.zeros(len(order), bool)  # same score and class as the one before
    same[1:] = (score[1:] == score[:-1]) & (label[1:] == label[:-1])
    tied = np.nonzero(same | np.append(same[1:], False))[0]  # usually few
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
    """All pairs (i, j) of intervals of one group that overlap by more than a point, and their IoU.

    Takes O((N + M) log M + P) for P pairs, unless the second intervals of a group are deeply nested.

    Args:
        group: (N,) groups of the first intervals, whole numbers.
        start: (N,) their starts.
        end: (N,) their ends, exclusive.
        other: (M,) groups of the second intervals.
        o_start: (M,) their starts.
        o_end: (M,) their ends, exclusive.

    Returns:
        i, j and IoU, (P,) each, ordered by i.
    """
    if len(other) == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    first, last = o_start.min(), o_end.max()
    scale = 0.5 / max(last - first, np.finfo(float).tiny)

    def key(group: np.ndarray, time: np.ndarray) -> np.ndarray:
        # The group as the integer part, the time as the fraction. Rounding may make two times of a group equal, but
        # never swaps them; equal ones are candidates below.
        return group + (time.clip(first, last) - first) * scale

    by_start = np.lexsort((o_start, other))
    key_start = key(other, o_start)[by_start]
    # The latest end so far. Keys of a later group are larger than all earlier ones, so the running maximum never takes
    # an end from another group.
    key_end = np.maximum.accumulate(key(other, o_end)[by_start])
    # Candidates for i: from the first j that may end after i starts to the last j that starts before i ends.
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
    """Detections that are matched: each gets the first ground truth of its pairs that is still free.

    Args:
        det: (P,) detections of the pairs, rising; the pairs of one detection in the order in which it tries them.
        gt: (P,) ground truths of the pairs.
        n_gt: Number of ground truths.

    Returns:
        Indices of the matched detections, rising, and of the ground truth that each got.
    """
    # A ground truth is taken at the latest by the first detection that tries it first. Later pairs need no look.
    tried_first = np.diff(det, prepend=-1) > 0
    latest = np.full(n_gt, np.iinfo(np.int64).max)
    latest[gt[tried_first][::-1]] = det[tried_first][::-1]  # numpy keeps the last value of repeated indices
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
