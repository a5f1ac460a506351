"""Snippet-level pDMI of every recording of a batch (Eq. 9)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from d2net.errors import InputError
from d2net.ops._checks import check_floating, check_same, check_shape, valid_mask
from d2net.ops.condition_number import log_condition_number


class SnippetPDMI(NamedTuple):
    """(B,) log condition numbers, and (B,) bool: the recording has pseudo-foreground and pseudo-background."""

    loss: Tensor
    valid: Tensor


def snippet_pdmi(
    attention: Tensor,
    scores: Tensor,
    lengths: Tensor | None = None,
    *,
    fg_threshold: float = 0.5,
    bg_threshold: float = 0.5,
    normalization: Literal["joint", "per_class"] = "joint",
) -> SnippetPDMI:
    """log condition number of U_1 = P_1 Y_1 (Eq. 9) per recording.

    Snippets with scores > fg_threshold are pseudo-foreground, those with scores < bg_threshold
    pseudo-background; scores only select, so no gradient flows to them.

    Args:
        attention: (B, T) top-down attention lambda in [0, 1].
        scores: (B, T) bottom-up foreground scores lambda' (Eq. 8).
        lengths: (B,) int64, or None (all T).
        normalization: "joint" divides by z = n_f + n_b as in the paper; "per_class" each column by its own count.

    Returns:
        SnippetPDMI(loss (B,), valid (B,)); loss is 0 where not valid.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, or an unknown normalization.
    """
    check_shape("snippet_pdmi", "attention", attention, "B, T")
    check_floating("snippet_pdmi", "attention", attention)
    check_same("snippet_pdmi", "attention", attention, "scores", scores)
    if normalization not in ("joint", "per_class"):
        raise InputError(f"snippet_pdmi: normalization is '{normalization}', expected 'joint' or 'per_class'")
    mask = valid_mask("snippet_pdmi", attention, lengths)
    attention = attention.masked_fill(~mask, 0)
    chosen = torch.stack([mask & (scores > fg_threshold), mask & (scores < bg_threshold)], 2).to(attention.dtype)
    count = chosen.sum(1)  # (B, 2): n_f, n_b
    valid = (count > 0).all(1)
    size = count if normalization == "per_class" else count.sum(1, keepdim=True)
    p = torch.stack([attention, 1 - attention], 1)  # (B, 2, T)
    u = p @ chosen / size.clamp(min=1)[:, None, :]
    return SnippetPDMI(log_condition_number(torch.where(valid[:, None, None], u, 0)), valid)
