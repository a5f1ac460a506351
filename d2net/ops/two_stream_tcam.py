"""The head of D2-Net: two streams of logits to TCAM, top-down attention and pooled scores (Fig. 2)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from d2net.ops._checks import check_floating, check_same, check_shape, valid_mask
from d2net.ops.topk_pool import topk_pool


class TCAM(NamedTuple):
    """Temporal class activation maps and what is derived from them.

    Attributes:
        tcam: (B, T, C) class activations in [0, 1]; 0 past a recording's length.
        attention: (B, T) top-down foreground attention, the maximum over classes; 0 past the length.
        pooled: (B, C) video-level prediction p.
    """

    tcam: Tensor
    attention: Tensor
    pooled: Tensor


class TCAMPool(NamedTuple):
    """(B, T) top-down attention (maximum over classes) and (B, C) pooled scores of a TCAM."""

    attention: Tensor
    pooled: Tensor


def tcam_pool(tcam: Tensor, lengths: Tensor | None = None, *, divisor: int = 8) -> TCAMPool:
    """lambda(t) = max_c T[t, c] and p = topk_pool(T)."""
    mask = valid_mask("tcam_pool", tcam, lengths)
    tcam = tcam.masked_fill(~mask[:, :, None], 0)
    return TCAMPool(tcam.amax(2), topk_pool(tcam, lengths, divisor=divisor))


def two_stream_tcam(logits_a: Tensor, logits_b: Tensor, lengths: Tensor | None = None, *, divisor: int = 8) -> TCAM:
    """T = (sigmoid(a) + sigmoid(b)) / 2, lambda(t) = max_c T[t, c], p = topk_pool(T).

    Args:
        logits_a, logits_b: (B, T, C) outputs of the streams' last layers.
        lengths: (B,) int64, or None (all T).
        divisor: see :func:`topk_pool`.

    Raises:
        InputError: shapes, dtypes or devices that do not fit.
    """
    check_shape("two_stream_tcam", "logits_a", logits_a, "B, T, C")
    check_floating("two_stream_tcam", "logits_a", logits_a)
    check_same("two_stream_tcam", "logits_a", logits_a, "logits_b", logits_b)
    mask = valid_mask("two_stream_tcam", logits_a, lengths)
    tcam = (0.5 * (logits_a.sigmoid() + logits_b.sigmoid())).masked_fill(~mask[:, :, None], 0)
    return TCAM(tcam, tcam.amax(2), topk_pool(tcam, lengths, divisor=divisor))
