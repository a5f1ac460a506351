"""The two-stream head, forward and backward: d2net.ops.two_stream_tcam and tcam_pool against plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from harness import OURS, Case, compiled, main

from d2net.ops import tcam_pool, two_stream_tcam


def plain_pool(tcam: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return tcam.amax(2), tcam.topk(math.ceil(tcam.shape[1] / 8), 1)[0].mean(1)


def plain(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As one writes it, for recordings of one length."""
    tcam = 0.5 * (a.sigmoid() + b.sigmoid())
    return tcam, *plain_pool(tcam)


def both_directions(function: Callable[..., tuple[torch.Tensor, ...]], *inputs: torch.Tensor) -> Callable[[], None]:
    """Forward, and backward from a gradient of every output."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    gradients = [torch.ones_like(x) for x in function(*inputs)]

    def run() -> None:
        torch.autograd.grad(function(*leaves), leaves, gradients)

    return run


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    compiled_head, compiled_pool = compiled(plain), compiled(plain_pool)
    shapes = [(2, 100, 20)] if quick else [(10, 750, 20), (10, 750, 100), (1, 750, 20)]
    inputs = [torch.randn(2, *shape, generator=generator).to(device).unbind() for shape in shapes]
    for (b, t, c), (x, y) in zip(shapes, inputs, strict=True):
        contenders = {OURS: both_directions(two_stream_tcam, x, y), "PyTorch": both_directions(plain, x, y)}
        if not quick:
            contenders["torch.compile"] = both_directions(compiled_head, x, y)
        # Forward: two logits in, a TCAM out. Backward: logits, TCAM and its gradient in, two gradients out.
        yield Case(f"B={b} T={t} C={c}", contenders, bytes=9 * 4 * x.numel())
    for (b, t, c), (x, y) in zip(shapes, inputs, strict=True):
        name, size = f"B={b} T={t} C={c}", 4 * x.numel()
        contenders = {OURS: lambda x=x, y=y: two_stream_tcam(x, y), "PyTorch": lambda x=x, y=y: plain(x, y)}
        yield Case(name + " forward", contenders, bytes=3 * size)
        tcam = x.sigmoid()
        contenders = {OURS: both_directions(tcam_pool, tcam), "PyTorch": both_directions(plain_pool, tcam)}
        if not quick:
            contenders["torch.compile"] = both_directions(compiled_pool, tcam)
        yield Case(name + " tcam_pool", contenders, bytes=3 * size)
    for t in [100, 1000] if quick else [100, 1000, 10_000, 100_000]:
        x, y = (torch.randn(1, t, 20, generator=generator).to(device) for _ in range(2))
        contenders = {OURS: both_directions(two_stream_tcam, x, y), "PyTorch": both_directions(plain, x, y)}
        yield Case(f"B=1 T={t} C=20", contenders, bytes=9 * 4 * x.numel(), size=t)


if __name__ == "__main__":
    main("two_stream_tcam", cases, __doc__)
