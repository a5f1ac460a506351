"""Pairwise IoU of segments: d2net.ops.iou_1d against plain PyTorch and numpy."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from harness import OURS, Case, main

from d2net.ops.iou import iou_1d, iou_1d_ref


def iou_numpy(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """As the evaluation scripts of the field write it."""
    overlap = np.minimum(a[:, None, 1], b[None, :, 1]) - np.maximum(a[:, None, 0], b[None, :, 0])
    overlap = overlap.clip(0)
    return overlap / ((a[:, 1] - a[:, 0])[:, None] + (b[:, 1] - b[:, 0])[None] - overlap)


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for n in [200, 20] if quick else [2000, 200, 20]:
        a, b = (torch.rand(n, 2, generator=generator).sort(1).values.to(device) for _ in range(2))
        contenders = {OURS: partial(iou_1d, a, b), "PyTorch": partial(iou_1d_ref, a, b)}
        if device.type == "cpu":
            contenders["numpy"] = partial(iou_numpy, a.numpy(), b.numpy())
        yield Case(f"{n} x {n}", contenders, bytes=4 * (4 * n + n * n), operations=8 * n * n, size=n)


if __name__ == "__main__":
    main("iou_1d", cases, __doc__)
