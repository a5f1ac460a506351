"""Foreground and background embeddings by attention (Eq. 2)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from d2net.errors import InputError
from d2net.ops._checks import check_floating, check_same, check_shape, valid_mask


class Pooled(NamedTuple):
    """(B, D) embeddings x_fg and x_bg, and (B,) bool: whether any snippet contributed."""

    x_fg: Tensor
    x_bg: Tensor
    valid_fg: Tensor
    valid_bg: Tensor


def attention_pool(
    x: Tensor,
    attention: Tensor,
    lengths: Tensor | None = None,
    *,
    threshold: float = 0.5,
    background_threshold: float = 0.5,
    reduction: Literal["sum", "mean"] = "sum",
) -> Pooled:
    """Weighted temporal pooling of embeddings into one foreground and one background vector (Eq. 2).

    Foreground weights are lambda where lambda > threshold, background weights 1 - lambda where
    1 - lambda > background_threshold; all others are 0.

    Args:
        x: (B, T, D) embeddings.
        attention: (B, T) foreground attention lambda in [0, 1].
        lengths: (B,) int64, or None (all T).
        reduction: "sum" as in the paper, or "mean": divided by the sum of the weights.

    Returns:
        Pooled(x_fg (B, D), x_bg (B, D), valid_fg (B,), valid_bg (B,)); zeros where not valid.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, or an unknown reduction.
    """
    check_shape("attention_pool", "x", x, "B, T, D")
    check_shape("attention_pool", "attention", attention, "B, T")
    check_floating("attention_pool", "x", x)
    check_same("attention_pool", "x", x, "attention", attention, 2)
    if reduction not in ("sum", "mean"):
        raise InputError(f"attention_pool: reduction is '{reduction}', expected 'sum' or 'mean'")
    mask = valid_mask("attention_pool", x, lengths)
    background = 1 - attention
    x = x.masked_fill(~mask[:, :, None], 0)  # a NaN in the padding times a weight of 0 would be NaN
    weights = torch.stack(
        [
            torch.where(mask & (attention > threshold), attention, 0),
            torch.where(mask & (background > background_threshold), background, 0),
        ],
        dim=1,
    ).to(x.dtype)
    total = weights.sum(2)
    pooled = weights @ x
    if reduction == "mean":
        pooled = pooled / torch.where(total > 0, total, 1)[:, :, None]
    return Pooled(pooled[:, 0], pooled[:, 1], total[:, 0] > 0, total[:, 1] > 0)
