"""Temporal top-k pooling, forward and backward: d2net.ops.topk_pool against plain PyTorch and numpy."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from harness import OURS, Case, compiled, forward_backward, main

from d2net.ops import topk_pool

DIVISOR = 8


def batched(x: torch.Tensor) -> torch.Tensor:
    """The usual line, for recordings of one length."""
    return x.topk(math.ceil(x.shape[1] / DIVISOR), 1)[0].mean(1)


def per_recording(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """As research code pools recordings of different lengths."""
    pooled = []
    for i, length in enumerate(lengths.tolist()):
        pooled.append(x[i, :length].topk(max(1, math.ceil(length / DIVISOR)), 0)[0].mean(0))
    return torch.stack(pooled)


def numpy_partition(x: np.ndarray) -> np.ndarray:
    """Forward only."""
    k = math.ceil(x.shape[1] / DIVISOR)
    return np.partition(x, x.shape[1] - k, axis=1)[:, -k:].mean(1)


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(10, 750, 20), (2, 100, 3)] if quick else [(10, 750, 20), (10, 750, 100), (1, 750, 20), (10, 100, 1)]
    inputs = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    compiled_batched = compiled(batched)
    for (b, t, c), x in zip(shapes, inputs, strict=True):
        contenders = {OURS: forward_backward(topk_pool, x), "PyTorch": forward_backward(batched, x)}
        if not quick:
            contenders["torch.compile"] = forward_backward(compiled_batched, x)
        # The backward reads x again and writes its gradient.
        yield Case(f"B={b} T={t} C={c}", contenders, bytes=3 * 4 * x.numel())
    for (b, t, c), x in zip(shapes, inputs, strict=True):
        lengths = torch.randint(t // 2, t + 1, (b,), generator=generator).to(device)
        name, size = f"B={b} T={t} C={c}", 4 * x.numel()
        contenders = {OURS: lambda x=x: topk_pool(x), "PyTorch": lambda x=x: batched(x)}
        if device.type == "cpu":
            contenders["numpy"] = lambda x=x: numpy_partition(x.numpy())
        yield Case(name + " forward", contenders, bytes=size)
        contenders = {
            OURS: forward_backward(lambda x, lengths=lengths: topk_pool(x, lengths), x),
            "PyTorch per recording": forward_backward(lambda x, lengths=lengths: per_recording(x, lengths), x),
        }
        yield Case(name + " ragged", contenders, bytes=3 * size)
    for t in [100, 1000] if quick else [100, 1000, 10_000, 100_000]:
        x = torch.randn(1, t, 20, generator=generator).to(device)
        contenders = {OURS: forward_backward(topk_pool, x), "PyTorch": forward_backward(batched, x)}
        yield Case(f"B=1 T={t} C=20", contenders, bytes=3 * 4 * x.numel(), size=t)


if __name__ == "__main__":
    main("topk_pool", cases, __doc__)
