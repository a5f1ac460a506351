"""Bottom-up attention of every snippet: d2net.ops.bottom_up_attention against plain PyTorch, numpy and a loop."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from harness import OURS, Case, compiled, forward_backward, main
from torch import Tensor
from torch.nn import functional as F

from d2net.ops import bottom_up_attention


def usual(x: Tensor, x_ref: Tensor) -> Tensor:
    return 0.5 * (1 - F.cosine_similarity(x, x_ref, dim=2))


def loop(x: Tensor, x_ref: Tensor) -> Tensor:
    """One recording after the other, as research code writes it."""
    return torch.stack([0.5 * (1 - F.cosine_similarity(features, x_ref[None])) for features in x])


def norms_and_product(x: Tensor, x_ref: Tensor) -> Tensor:
    """The best of plain PyTorch: two reads of x, no large temporary."""
    return 0.5 * (1 - (x @ x_ref) / (x.norm(dim=2) * x_ref.norm()))


def with_numpy(x: np.ndarray, x_ref: np.ndarray) -> np.ndarray:
    return 0.5 * (1 - (x @ x_ref) / (np.linalg.norm(x, axis=2) * np.linalg.norm(x_ref)))


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    sizes = [
        (10, 750, 1024),
        (1, 750, 1024),
        (10, 100, 1024),
        (10, 3000, 1024),
        (20, 750, 2048),
        (10, 750, 64),
        (1, 20, 32),
        *((1, t, 64) for t in (100, 1000, 10_000, 100_000)),
    ]
    for b, t, d in [(2, 50, 64)] if quick else sizes:
        x, x_ref = torch.randn(b, t, d, generator=generator), torch.randn(d, generator=generator)
        x, x_ref = x.to(device), x_ref.to(device)
        functions = {
            OURS: bottom_up_attention,
            "F.cosine_similarity": usual,
            "PyTorch norm and product": norms_and_product,
            "loop over recordings": loop,
        }
        compiler = {"torch.compile": compiled(usual)} if (b, t, d) == (10, 750, 1024) else {}
        contenders = {name: partial(f, x, x_ref) for name, f in (functions | compiler).items()}
        if device.type == "cpu":
            contenders["numpy"] = partial(with_numpy, x.numpy(), x_ref.numpy())
        size = t if (b, d) == (1, 64) else None
        yield Case(f"B={b} T={t} D={d} forward", contenders, bytes=4 * b * t * (d + 1), size=size)
        if (b, t, d) in [(10, 750, 1024), (2, 50, 64)]:
            contenders = {name: forward_backward(f, x, x_ref) for name, f in functions.items()}
            yield Case(f"B={b} T={t} D={d} forward+backward", contenders, bytes=4 * b * t * 3 * (d + 1))


if __name__ == "__main__":
    main("bottom_up_attention", cases, __doc__)
