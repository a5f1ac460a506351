"""Leaky ReLU within the lengths, forward and backward: d2net.ops.masked_leaky_relu against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from harness import OURS, Case, compiled, main
from torch.nn import functional as F

from d2net.ops import masked_leaky_relu


def plain(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """As one writes it."""
    past = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
    return F.leaky_relu(x.masked_fill(past[:, :, None], 0), 0.2)


def both_directions(
    function: Callable[..., torch.Tensor], x: torch.Tensor, lengths: torch.Tensor
) -> Callable[[], None]:
    leaf, gradient = x.detach().clone().requires_grad_(), torch.ones_like(x)

    def run() -> None:
        torch.autograd.grad(function(leaf, lengths), leaf, gradient)

    return run


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    compiled_plain = compiled(plain)
    for b, t, d in [(2, 100, 64)] if quick else [(10, 300, 64), (10, 750, 1024), (1, 750, 1024)]:
        x = torch.randn(b, t, d, generator=generator).to(device)
        lengths = torch.linspace(t, t // 2, b, device=device).long()
        contenders = {
            OURS: both_directions(masked_leaky_relu, x, lengths),
            "PyTorch": both_directions(plain, x, lengths),
        }
        if not quick:
            contenders["torch.compile"] = both_directions(compiled_plain, x, lengths)
        # Forward: x in, y out. Backward: y and its gradient in, one gradient out.
        yield Case(f"B={b} T={t} D={d}", contenders, bytes=5 * 4 * x.numel())


if __name__ == "__main__":
    main("masked_leaky_relu", cases, __doc__)
