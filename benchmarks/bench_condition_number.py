"""log condition numbers: d2net.ops against torch.linalg.svdvals with autograd, and for U = P Y against forming U.

Rank-deficient matrices have no gradient through svdvals, so all of these have full rank but for the joint ones, where
the contender masks as its users would.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import OURS, Case, compiled, forward_backward, main
from torch import Tensor

from d2net.ops import joint_log_condition_number, log_condition_number
from d2net.ops.condition_number import joint_log_condition_number_ref, log_condition_number_ref


def with_svdvals(u: Tensor) -> Tensor:
    """The usual lines."""
    sigma = torch.linalg.svdvals(u)
    return (sigma[:, 0] / torch.where(sigma > 1e-5, sigma, torch.inf).amin(1)).log()


def one_by_one(u: Tensor) -> Tensor:
    """As research code writes it: recording by recording."""
    return torch.stack([with_svdvals(x[None])[0] for x in u])


def closed_form(u: Tensor) -> Tensor:
    """2x2 by hand, without care for cancellation."""
    squares, determinant = u.square().sum((1, 2)), torch.linalg.det(u).abs()
    return ((squares + (squares.square() - 4 * determinant.square()).clamp(min=1e-30).sqrt()) / 2 / determinant).log()


def joint_svdvals(p: Tensor, y: Tensor) -> Tensor:
    return with_svdvals(p @ y)


def square(device: torch.device, quick: bool, n: int, size: int) -> Case:
    u = torch.rand(n, size, size, generator=torch.Generator().manual_seed(n)).to(device)
    functions = {OURS: log_condition_number, "svdvals": with_svdvals, "reference": log_condition_number_ref}
    if n <= 1024:
        functions["svdvals one by one"] = one_by_one
    if size == 2:
        functions["closed form"] = closed_form
        if not quick:
            functions["closed form, compiled"] = compiled(closed_form)
    return Case(
        f"{n} of {size} x {size}",
        {name: forward_backward(function, u) for name, function in functions.items()},
        bytes=4 * 2 * u.numel(),
        operations=0 if size == 2 else n * 8 * size**3 // 3,  # bidiagonalisation
        size=n if size == 2 else None,
        once=frozenset({"svdvals one by one"}),
    )


def joint(device: torch.device, n: int, classes: int, items: int) -> Case:
    generator = torch.Generator().manual_seed(n)
    p = torch.rand(n, classes, items, generator=generator).to(device)
    y = torch.rand(n, items, classes, generator=generator).to(device)
    functions = {
        OURS: joint_log_condition_number,
        "form U, svdvals": joint_svdvals,
        "reference": joint_log_condition_number_ref,
    }
    return Case(
        f"joint, {n} of C={classes} n={items}",
        {name: forward_backward(function, p, y) for name, function in functions.items()},
        bytes=4 * 2 * (p.numel() + y.numel()),
        operations=n * (4 * classes * min(items, classes) ** 2 + 8 * min(items, classes) ** 3 // 3),
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    yield square(device, quick, 1024, 2)
    yield joint(device, 1, 20, 10) if quick else joint(device, 64, 100, 10)
    for n, size in [(16, 2), (64, 20)] if quick else [(16, 2), (16384, 2), (64, 20), (64, 100), (16, 128)]:
        yield square(device, quick, n, size)
    for n, classes, items in [] if quick else [(1, 20, 10), (1, 100, 10), (64, 20, 20)]:
        yield joint(device, n, classes, items)


if __name__ == "__main__":
    main("log_condition_number", cases, __doc__)
