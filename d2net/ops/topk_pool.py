"""Temporal top-k pooling: video-level scores from snippet-level activations (Sec. 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from d2net.errors import InputError
from d2net.ops._checks import check_floating, check_shape, valid_mask


def topk_pool(x: Tensor, lengths: Tensor | None = None, *, divisor: int = 8) -> Tensor:
    """Mean of the k largest values over time, k = max(1, ceil(length / divisor)), per recording.

    Args:
        x: (B, T, C) activations, floating point.
        lengths: (B,) int64 snippets of each recording, or None (all T). Later snippets never matter.
        divisor: share of the snippets that count; 8 in the paper.

    Returns:
        (B, C) pooled scores; 0 for a recording of length 0. Ties break towards the earlier snippet; a NaN is
        larger than every number, so it propagates.

    Raises:
        InputError: wrong shape, dtype or device, or divisor < 1.
    """
    check_shape("topk_pool", "x", x, "B, T, C")
    check_floating("topk_pool", "x", x)
    if divisor < 1:
        raise InputError(f"topk_pool: divisor is {divisor}, expected at least 1")
    mask = valid_mask("topk_pool", x, lengths)
    length = mask.sum(1)
    k = ((length + divisor - 1) // divisor).clamp(min=1)
    most = max(1, -(-x.shape[1] // divisor)) if x.shape[1] else 0  # no recording needs more
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    ordered, _ = wide.masked_fill(~mask[:, :, None], -torch.inf).sort(dim=1, descending=True, stable=True)
    chosen = torch.arange(most, device=x.device)[None, :] < torch.minimum(k, length)[:, None]
    top = torch.where(chosen[:, :, None], ordered[:, :most], 0)
    return (top.sum(1) / k[:, None]).to(x.dtype)
