"""Foreground and background embeddings, forward and backward: d2net.ops.attention_pool against what it replaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from harness import OURS, Case, compiled, main
from torch import Tensor

from d2net.ops import attention_pool


def usual(x: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
    """The batched one-liners that a user would write."""
    background = 1 - attention
    fg = torch.where(attention > 0.5, attention, 0)
    bg = torch.where(background > 0.5, background, 0)
    return (fg[..., None] * x).sum(1), (bg[..., None] * x).sum(1)


def matmul(x: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
    """The same as one batched matrix product: the best of plain PyTorch."""
    background = 1 - attention
    weights = torch.stack(
        [torch.where(attention > 0.5, attention, 0), torch.where(background > 0.5, background, 0)], dim=1
    )
    return (weights @ x).unbind(1)


def loop(x: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
    """A loop over recordings that gathers the selected snippets, as research code writes it."""
    fg, bg = [], []
    for features, lam in zip(x, attention, strict=True):
        above, below = lam > 0.5, 1 - lam > 0.5
        fg.append((features[above] * lam[above][:, None]).sum(0))
        bg.append((features[below] * (1 - lam[below])[:, None]).sum(0))
    return torch.stack(fg), torch.stack(bg)


def ours(x: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
    return attention_pool(x, attention)[:2]


def forward_backward(function: Callable[..., tuple[Tensor, Tensor]], x: Tensor, attention: Tensor) -> Callable:
    leaves = [v.clone().requires_grad_() for v in (x, attention)]
    grads = [torch.ones_like(x[:, 0])] * 2
    return lambda: torch.autograd.grad(function(*leaves), leaves, grads)


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
        x, attention = torch.randn(b, t, d, generator=generator), torch.rand(b, t, generator=generator)
        x, attention = x.to(device), attention.to(device)
        functions = {OURS: ours, "PyTorch": usual, "PyTorch matmul": matmul, "loop over recordings": loop}
        compiler = {"torch.compile": compiled(usual)} if (b, t, d) == (10, 750, 1024) else {}
        size = t if (b, d) == (1, 64) else None
        yield Case(
            f"B={b} T={t} D={d} forward",
            {name: lambda f=f, x=x, a=attention: f(x, a) for name, f in functions.items()},
            bytes=4 * b * t * (d + 1),
        )
        yield Case(
            f"B={b} T={t} D={d} forward+backward",
            {name: forward_backward(f, x, attention) for name, f in (functions | compiler).items()},
            bytes=4 * b * t * 3 * (d + 1),  # x read twice, its gradient written
            size=size,
        )


if __name__ == "__main__":
    main("attention_pool", cases, __doc__)
