"""Snippet-level pDMI (Eq. 9): d2net.ops.snippet_pdmi against the same in plain PyTorch, batched and recording by
recording."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from harness import OURS, Case, compiled, forward_backward, main
from torch import Tensor

from d2net.ops import snippet_pdmi
from d2net.ops.snippet_pdmi import snippet_pdmi_ref


def ours(attention: Tensor, *, scores: Tensor) -> Tensor:
    return snippet_pdmi(attention, scores).loss


def reference(attention: Tensor, *, scores: Tensor) -> Tensor:
    return snippet_pdmi_ref(attention, scores, None, 0.5, 0.5, False, 0.0, 1e-5).loss


def batched(attention: Tensor, *, scores: Tensor) -> Tensor:
    """The usual lines: P Y for the whole batch, then its singular values."""
    y = torch.stack([scores > 0.5, scores < 0.5], 2).to(attention.dtype)
    u = torch.stack([attention, 1 - attention], 1) @ y / y.sum((1, 2))[:, None, None]
    sigma = torch.linalg.svdvals(u)
    return (sigma[:, 0] / sigma[:, 1]).log()


def one_by_one(attention: Tensor, *, scores: Tensor) -> Tensor:
    """As research code writes it."""
    return torch.cat([batched(a[None], scores=s[None]) for a, s in zip(attention, scores, strict=True)])


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for b, t in [(10, 750), (10, 100)] if quick else [(10, 750), (10, 3000), (10, 100), (10, 10000), (10, 100000)]:
        attention, scores = (torch.rand(b, t, generator=generator).to(device) for _ in range(2))
        functions = {OURS: ours, "batched": batched, "one by one": one_by_one, "reference": reference}
        functions["batched, compiled"] = compiled(batched)
        yield Case(
            f"B={b} T={t}",
            {name: forward_backward(partial(f, scores=scores), attention) for name, f in functions.items()},
            bytes=4 * b * t * 4,  # attention and scores, scores again and the gradient
            size=t,
        )
    if quick:
        return
    for b in (1, 100, 1000):
        attention, scores = (torch.rand(b, 750, generator=generator).to(device) for _ in range(2))
        functions = {OURS: ours, "batched": batched}
        yield Case(
            f"B={b} T=750",
            {name: forward_backward(partial(f, scores=scores), attention) for name, f in functions.items()},
            bytes=4 * b * 750 * 4,
        )


if __name__ == "__main__":
    main("snippet_pdmi", cases, __doc__)
