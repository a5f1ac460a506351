"""mAP of detections: d2net.evaluation.evaluate against the published way, a numpy loop over detections.

The data is synthetic, of THUMOS14's size: 139,000 detections in 212 videos and 20 classes, 15 true segments a video of
one class each, seven temporal IoUs from 0.1 to 0.7. As a trained localizer would have it, nine in ten detections are
of their video's own class, and three in ten near a true segment. The published way looks up each detection's ground
truth in a pandas table, which is most of its time; the other contender is the same in plain numpy.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from harness import OURS, Case, main

from d2net.detections import Annotations, Detections
from d2net.evaluation import THUMOS14_TIOU, evaluate

CLASSES = 20


def synthetic(n: int, n_videos: int) -> tuple[Detections, Annotations]:
    generator = np.random.default_rng(n)
    videos = tuple(f"video_{i:04d}" for i in range(n_videos))
    classes = tuple(f"class_{i:02d}" for i in range(CLASSES))
    gt_video = np.repeat(np.arange(n_videos), 15)
    gt_label = generator.integers(CLASSES, size=n_videos)[gt_video]
    gt_start = generator.uniform(0, 190, len(gt_video))
    gt_end = gt_start + generator.uniform(1, 10, len(gt_video))
    truth = Annotations(videos, classes, gt_video, gt_label, gt_start, gt_end, ambiguous=np.zeros((0, 3)))

    near = generator.integers(len(gt_video), size=n)
    is_near = generator.random(n) < 0.3
    video = np.where(is_near, gt_video[near], generator.integers(n_videos, size=n))
    own_class = is_near | (generator.random(n) < 0.85)
    label = np.where(own_class, gt_label[15 * video], generator.integers(CLASSES, size=n))
    start = np.where(is_near, gt_start[near] + generator.normal(0, 1, n), generator.uniform(0, 190, n))
    end = np.where(is_near, gt_end[near] + generator.normal(0, 1, n), start + generator.uniform(1, 10, n))
    score = generator.random(n) * np.where(is_near, 1, 0.5)
    return Detections(videos, classes, video, label, start, np.maximum(start, end), score=score), truth


# Start and end of the ground truth of a video, and its rows; None where it has none.
Lookup = Callable[[int], tuple[np.ndarray, np.ndarray, np.ndarray] | None]


def arrays_lookup(truth: Annotations, rows: np.ndarray) -> Lookup:
    by_video = {v: rows[truth.video[rows] == v] for v in np.unique(truth.video[rows])}
    found = {v: (truth.start[its], truth.end[its], its) for v, its in by_video.items()}
    return found.get


def pandas_lookup(truth: Annotations, rows: np.ndarray) -> Lookup:
    import pandas

    table = pandas.DataFrame({"video": truth.video[rows], "start": truth.start[rows], "end": truth.end[rows]}, rows)
    by_video = table.groupby("video")

    def lookup(video: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        try:
            its = by_video.get_group(video).reset_index()
        except KeyError:
            return None
        return its["start"].values, its["end"].values, its["index"].values

    return lookup


def published_way(found: Detections, truth: Annotations, tiou: np.ndarray, lookup_in: Callable) -> np.ndarray:
    """(N,) mean AP. As the ActivityNet toolkit goes about it: detection by detection, ground truth by IoU."""
    ap = np.zeros((len(truth.classes), len(tiou)))
    for c in range(len(truth.classes)):
        rows = np.nonzero(truth.label == c)[0]
        positives = len(rows)
        lookup = lookup_in(truth, rows)
        taken = np.full((len(tiou), len(truth)), -1)
        mine = np.nonzero(found.label == c)[0]
        mine = mine[np.argsort(-found.score[mine], kind="stable")]
        tp, fp = np.zeros((len(tiou), len(mine))), np.zeros((len(tiou), len(mine)))
        for rank, d in enumerate(mine):
            true_segments = lookup(found.video[d])
            if true_segments is None:
                fp[:, rank] = 1
                continue
            start, end, its = true_segments
            shared = (np.minimum(found.end[d], end) - np.maximum(found.start[d], start)).clip(0)
            iou = shared / ((end - start) + (found.end[d] - found.start[d]) - shared)
            best_first = iou.argsort()[::-1]
            for t, threshold in enumerate(tiou):
                for j in best_first:
                    if iou[j] < threshold:
                        fp[t, rank] = 1
                        break
                    if taken[t, its[j]] >= 0:
                        continue
                    tp[t, rank] = 1
                    taken[t, its[j]] = rank
                    break
                if fp[t, rank] == 0 and tp[t, rank] == 0:
                    fp[t, rank] = 1
        true, false = tp.cumsum(1), fp.cumsum(1)
        for t in range(len(tiou)):
            precision = np.hstack([[0], true[t] / (true[t] + false[t]), [0]])
            recall = np.hstack([[0], true[t] / max(positives, 1), [1]])
            precision = np.maximum.accumulate(precision[::-1])[::-1]
            step = np.nonzero(recall[1:] != recall[:-1])[0] + 1
            ap[c, t] = ((recall[step] - recall[step - 1]) * precision[step]).sum()
    return 100 * ap[np.unique(truth.label)].mean(axis=0)


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    if device.type != "cpu":
        raise SystemExit("evaluation runs on the CPU only: leave out --device")
    tiou = np.array(THUMOS14_TIOU)
    for n, videos in [(3_000, 10)] if quick else [(3_000, 10), (14_000, 21), (139_000, 212), (1_390_000, 2120)]:
        found, truth = synthetic(n, videos)
        contenders = {OURS: partial(evaluate, found, truth, tiou=THUMOS14_TIOU)}
        if n <= 139_000:
            contenders["numpy loop"] = partial(published_way, found, truth, tiou, arrays_lookup)
            np.testing.assert_allclose(contenders[OURS]().map, contenders["numpy loop"]())
            if importlib.util.find_spec("pandas"):
                contenders["published way (pandas)"] = partial(published_way, found, truth, tiou, pandas_lookup)
        yield Case(
            f"{n} detections, {videos} videos",
            contenders,
            bytes=40 * (len(found) + len(truth)),
            size=n,
            once=frozenset(contenders) - {OURS},
        )


if __name__ == "__main__":
    main("evaluation", cases, __doc__)
