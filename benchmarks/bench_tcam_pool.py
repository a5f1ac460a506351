"""Top-down attention and pooled scores of a TCAM, forward and backward: d2net.ops.tcam_pool against plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from harness import OURS, Case, compiled, main

from d2net.ops import tcam_pool


def plain(tcam: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As one writes it, for recordings of one length."""
    return tcam.amax(2), tcam.topk(math.ceil(tcam.shape[1] / 8), 1)[0].mean(1)


def both_directions(
    function: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], x: torch.Tensor
) -> Callable[[], None]:
    """Forward, and backward from a gradient of every output."""
    leaf = x.detach().clone().requires_grad_()
    gradients = [torch.ones_like(y) for y in function(x)]

    def run() -> None:
        torch.autograd.grad(function(leaf), leaf, gradients)

    return run


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    compiled_pool = compiled(plain)
    shapes = [(2, 100, 20)] if quick else [(10, 750, 20), (10, 750, 100), (1, 750, 20)]
    for b, t, c in shapes:
        x = torch.rand(b, t, c, generator=generator).to(device)
        contenders = {OURS: both_directions(tcam_pool, x), "PyTorch": both_directions(plain, x)}
        if not quick:
            contenders["torch.compile"] = both_directions(compiled_pool, x)
        # Activations are read in both directions, a gradient is written.
        yield Case(f"B={b} T={t} C={c}", contenders, bytes=3 * 4 * x.numel())
        contenders = {OURS: lambda x=x: tcam_pool(x), "PyTorch": lambda x=x: plain(x)}
        yield Case(f"B={b} T={t} C={c} forward", contenders, bytes=4 * x.numel())
    for t in [100, 1000] if quick else [100, 1000, 10_000, 100_000]:
        x = torch.rand(1, t, 20, generator=generator).to(device)
        contenders = {OURS: both_directions(tcam_pool, x), "PyTorch": both_directions(plain, x)}
        yield Case(f"B=1 T={t} C=20", contenders, bytes=3 * 4 * x.numel(), size=t)


if __name__ == "__main__":
    main("tcam_pool", cases, __doc__)
