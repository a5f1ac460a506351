"""Proposals and class-wise NMS: d2net.ops.extract_proposals against numpy, Python lists and plain PyTorch.

The lengths are those of the 212 test videos of THUMOS14 (durations of its annotations at 25 frames a second and 16
frames a snippet); the activations on them are generated. Thresholds 0.025 to 0.5 and NMS at 0.5, as in the paper.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from harness import OURS, Case, main

from d2net.ops.proposals import extract_proposals, extract_proposals_ref
from d2net.ops.topk_pool import topk_pool

SLOW = frozenset({"PyTorch", "numpy", "Python lists"})
THRESHOLDS = [0.025 * i for i in range(1, 21)]
NMS_IOU = 0.5
CLASSES = 20
# fmt: off
TEST_LENGTHS = [int(length) for length in """
    52 104 754 123 324 228 355 367 278 181 178 23 154 345 134 299 204 299 263 841 154 384 160 73 331 327 275 201 336
    301 118 364 378 217 232 112 1009 198 347 459 190 1325 172 287 324 66 327 239 216 319 242 455 245 157 44 194 1109
    113 372 285 45 112 105 314 78 137 256 52 87 674 324 279 322 510 320 187 398 49 134 538 182 64 265 203 276 26 101
    280 1048 63 353 226 166 230 642 56 207 183 120 348 137 153 2614 199 169 249 283 598 264 42 368 355 305 54 388
    603 354 187 492 145 43 2055 99 43 288 302 128 155 189 366 276 1509 431 238 445 330 101 152 767 108 183 259 75
    110 401 282 105 287 74 339 200 943 188 157 1322 171 365 186 201 1405 645 71 1724 548 239 181 375 1313 145 1973
    387 197 148 413 97 110 319 132 271 538 86 256 273 244 650 343 901 221 484 269 559 30 446 359 113 1273 45 166 288
    65 320 826 236 291 82 72 332 339 373 179 161 223
""".split()]
# fmt: on


def generate(lengths: list[int], generator: torch.Generator) -> torch.Tensor:
    """Activations (B, T, C) as a trained model gives them: long stretches near 0, plateaus near 1, noise on both.

    One class of a recording acts, in stretches of 3 to 40 snippets; others respond to the same stretches, weakly.
    """
    x = torch.full((len(lengths), max(lengths), CLASSES), -3.0)
    for b, length in enumerate(lengths):
        acting = torch.zeros(length)
        for start in torch.randint(length, (1 + length // 60,), generator=generator).tolist():
            acting[start : start + int(torch.randint(3, 41, (1,), generator=generator))] = 1
        response = torch.rand(CLASSES, generator=generator) ** 8 * 3
        response[int(torch.randint(CLASSES, (1,), generator=generator))] = 6
        x[b, :length] += acting[:, None] * response
    noise = torch.nn.functional.avg_pool1d(torch.randn(x.mT.shape, generator=generator), 5, 1, 2).mT
    return torch.sigmoid(x + 2 * noise)


def relevant(activations: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Classes whose video-level score is above half the best one (Sec. 3.3)."""
    pooled = topk_pool(activations, lengths)
    return pooled > 0.5 * pooled.amax(1, keepdim=True)


def proposals_numpy(sequences: np.ndarray, classes: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """One recording (T, C) as most repositories of the field do it; rows (start, end, score) of each class."""
    found = []
    for label in np.where(classes)[0]:
        x = sequences[:, label]
        proposals = []
        for threshold in THRESHOLDS:
            above = np.where(x > threshold)[0]
            if len(above) == 0:
                continue
            for run in np.split(above, np.where(np.diff(above) != 1)[0] + 1):
                start, end = run[0], run[-1] + 1
                reach = max(1, int(0.25 * (end - start)))
                around = np.concatenate((x[max(0, start - reach) : start], x[end : end + reach]))
                outer = np.mean(around) if len(around) else 0.0
                proposals.append([start, end, np.mean(x[start:end]) - outer])
        if proposals:
            found.append((int(label), nms_numpy(np.array(proposals))))
    return found


def nms_numpy(proposals: np.ndarray) -> np.ndarray:
    start, end, score = proposals.T
    order = score.argsort()[::-1]
    keep = []
    while order.size > 0:
        i, rest = order[0], order[1:]
        keep.append(i)
        overlap = np.maximum(0, np.minimum(end[i], end[rest]) - np.maximum(start[i], start[rest]))
        iou = overlap / (end[i] - start[i] + end[rest] - start[rest] - overlap)
        order = rest[iou < NMS_IOU]
    return proposals[keep]


def proposals_lists(sequences: list[list[float]], classes: list[bool]) -> list[tuple[int, list[list[float]]]]:
    """The same with loops and lists; ``sequences`` holds one list a class."""
    found = []
    for label, relevant in enumerate(classes):
        if not relevant:
            continue
        x = sequences[label]
        proposals = []
        for threshold in THRESHOLDS:
            runs: list[list[int]] = []
            for t, value in enumerate(x):
                if value > threshold:
                    if runs and runs[-1][-1] == t - 1:
                        runs[-1].append(t)
                    else:
                        runs.append([t])
            for run in runs:
                start, end = run[0], run[-1] + 1
                reach = max(1, int(0.25 * (end - start)))
                around = x[max(0, start - reach) : start] + x[end : end + reach]
                outer = sum(around) / len(around) if around else 0.0
                proposals.append([start, end, sum(x[start:end]) / (end - start) - outer])
        found.append((label, nms_lists(proposals)))
    return found


def nms_lists(proposals: list[list[float]]) -> list[list[float]]:
    keep: list[list[float]] = []
    for start, end, score in sorted(proposals, key=lambda proposal: -proposal[2]):
        for a, b, _ in keep:
            overlap = max(0, min(end, b) - max(start, a))
            if overlap / (end - start + b - a - overlap) >= NMS_IOU:
                break
        else:
            keep.append([start, end, score])
    return keep


def contenders(activations: torch.Tensor, classes: torch.Tensor, lengths: list[int]) -> dict:
    """What turns a padded batch into proposals."""
    options = {"thresholds": THRESHOLDS, "nms_iou": NMS_IOU}
    valid = torch.tensor(lengths, device=activations.device)
    recordings = [x[:n].contiguous() for x, n in zip(activations, lengths, strict=True)]
    runs = {
        OURS: partial(extract_proposals, activations, classes, valid, **options),
        "d2net, a call a video": lambda: [
            extract_proposals(x[None], kept[None], **options) for x, kept in zip(recordings, classes, strict=True)
        ],
        "PyTorch": partial(extract_proposals_ref, activations, classes, valid, **options),
    }
    if activations.device.type == "cpu":
        arrays = [(x.numpy(), kept.numpy()) for x, kept in zip(recordings, classes, strict=True)]
        lists = [(x.T.tolist(), kept.tolist()) for x, kept in zip(recordings, classes, strict=True)]
        runs["numpy"] = lambda: [proposals_numpy(*a) for a in arrays]
        runs["Python lists"] = lambda: [proposals_lists(*a) for a in lists]
    return runs


def check_agreement(runs: dict) -> None:
    """All contenders find the same, apart from what rounding of the scores decides."""
    found = runs[OURS]()
    ours = set(
        zip(found.recording.tolist(), found.label.tolist(), found.start.tolist(), found.end.tolist(), strict=True)
    )
    for name in ("numpy", "Python lists"):
        if name in runs:
            theirs = {
                (b, label, int(p[0]), int(p[1]))
                for b, video in enumerate(runs[name]())
                for label, kept in video
                for p in kept
            }
            if len(ours & theirs) < 0.99 * len(ours | theirs):
                raise RuntimeError(
                    f"{name} and d2net disagree on {len(ours ^ theirs)} of {len(ours | theirs)} proposals"
                )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    lengths = TEST_LENGTHS[:10] if quick else TEST_LENGTHS
    activations = generate(lengths, generator).to(device)
    few = relevant(activations, torch.tensor(lengths, device=device))
    for what, classes in (("classes above half the best", few), ("all classes", torch.ones_like(few))):
        runs = contenders(activations, classes, lengths)
        if classes is few:
            check_agreement(runs)
        else:
            runs.pop("Python lists", None)  # takes a minute
        kept = classes.sum(1)
        spread = f"{int(kept.min())} to {int(kept.max())}, mean {kept.double().mean():.1f}"
        yield Case(
            f"{len(lengths)} test videos, {what} ({spread})",
            runs,
            bytes=4 * sum(n * k for n, k in zip(lengths, kept.tolist(), strict=True)),
            once=SLOW,
        )

    for size in [100, 1000] if quick else [100, 1000, 10_000, 100_000]:
        activations = generate([size], generator).to(device)
        classes = relevant(activations, torch.tensor([size], device=device))
        runs = contenders(activations, classes, [size])
        del runs["d2net, a call a video"]
        if size > 10_000:  # their NMS is quadratic: minutes
            runs.pop("numpy", None)
            runs.pop("Python lists", None)
        yield Case(
            f"1 x {size}, {int(classes.sum())} of {CLASSES} classes",
            runs,
            bytes=4 * size * int(classes.sum()),
            size=size,
            once=SLOW if size >= 10_000 else frozenset(),
        )


if __name__ == "__main__":
    main("extract_proposals", cases, __doc__)
