"""Pairwise temporal intersection over union."""

from __future__ import annotations

import torch
from torch import Tensor

from d2net.errors import InputError


def iou_1d(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every segment of ``a`` with every segment of ``b``.

    Args:
        a: (N, 2) start and end, in any unit of time shared with ``b``.
        b: (M, 2).

    Returns:
        (N, M) values in [0, 1]: 0 where the union is empty. A segment that ends before it starts counts as
        empty; NaN propagates. Integers are computed in float64, half precision in float32.

    Raises:
        InputError: an argument that is not (N, 2).
    """
    for name, x in (("a", a), ("b", b)):
        if x.ndim != 2 or x.shape[1] != 2:
            raise InputError(f"iou_1d: {name} has shape {tuple(x.shape)}, expected (N, 2) with start and end of each")
    dtype = torch.promote_types(a.dtype, b.dtype)
    dtype = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.float64
    a, b = a.to(dtype)[:, None], b.to(dtype)[None]
    overlap = (torch.minimum(a[..., 1], b[..., 1]) - torch.maximum(a[..., 0], b[..., 0])).clamp(min=0)
    union = (a[..., 1] - a[..., 0]).clamp(min=0) + (b[..., 1] - b[..., 0]).clamp(min=0) - overlap
    return overlap / torch.where(union == 0, 1, union)  # not 0/0, whose gradient is NaN
