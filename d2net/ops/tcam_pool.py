"""Top-down attention and pooled scores of a TCAM (Fig. 2) in one call, with one backward for both."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from d2net.ops import _library, _native
from d2net.ops._native import Native
from d2net.ops.checks import as_tensor, as_whole, check_like, within
from d2net.ops.packed import as_offsets, as_padded, blank_like, packed, padded_shape
from d2net.ops.topk_pool import check_pooled, check_taken, topk_pool_ref, topk_struct


class TCAMPool(NamedTuple):
    """What is derived from temporal class activation maps.

    Attributes:
        attention: (B, T) top-down foreground attention, the maximum over classes; 0 past the length.
        pooled: (B, C) video-level prediction p.
    """

    attention: Tensor
    pooled: Tensor


def tcam_pool(
    tcam: Tensor,
    lengths: Tensor | None = None,
    *,
    divisor: int = 8,
    offsets: Tensor | None = None,
    max_length: int | None = None,
) -> TCAMPool:
    """lambda(t) = max_c T[t, c] and p = topk_pool(T) of a ready TCAM, with one backward for both.

    Args:
        tcam: (B, T, C) class activations, floating point.
        lengths: (B,) int64, or None (all T).
        divisor: see :func:`topk_pool`.
        offsets: (B+1,) int64 of a packed batch, or None. Recording b has the rows of tcam (N, C) from offsets[b] on,
            and attention is (N,); see :mod:`d2net.ops.packed`.
        max_length: of a packed batch, an upper bound of the lengths; None: N. Longer recordings are cut.

    Returns:
        TCAMPool(attention (B, T), pooled (B, C)); attention is 0 past a length and where there are no classes. NaN is
        larger than every number. Of equal class maxima the lower class gets the gradient. Differentiable once.

    Raises:
        InputError: wrong shape, dtype or device, T or C of 2^31 or more, a divisor that is no whole number >= 1, or
            offsets that are wrong (see :func:`~d2net.ops.packed.as_offsets`).
    """
    tcam, divisor = as_tensor("tcam_pool", "tcam", tcam), as_whole("tcam_pool", "divisor", divisor)
    lengths = None if lengths is None else as_tensor("tcam_pool", "lengths", lengths, tcam)
    offsets, t = as_offsets("tcam_pool", offsets, max_length, tcam)
    if _library.has_kernel("tcam_pool", tcam):
        return TCAMPool(*_tcam_pool(tcam, lengths, divisor, offsets, t)[:2])
    _check(tcam, lengths, divisor, offsets, t)
    if offsets is None:
        return tcam_pool_ref(tcam, lengths, divisor=divisor)
    lengths, (x,) = as_padded(offsets, lengths, t, tcam)
    attention, pooled = tcam_pool_ref(x, lengths, divisor=divisor)
    return TCAMPool(packed(attention, offsets, lengths, tcam.shape[0]), pooled)


def tcam_pool_ref(tcam: Tensor, lengths: Tensor | None = None, *, divisor: int = 8) -> TCAMPool:
    """:func:`tcam_pool` in plain PyTorch, on any device, without checks."""
    inside = tcam.masked_fill(~within(tcam, lengths)[:, :, None], 0)
    return TCAMPool(class_max(inside), topk_pool_ref(inside, lengths, divisor=divisor))


def class_max(x: Tensor) -> Tensor:
    """(B, T) maxima over the classes of (B, T, C), in plain PyTorch; 0 where there are none."""
    # `max` over one dimension gives the gradient to the first maximum, where `amax` shares it among equals, and so
    # leaves that of a padded NaN, which is 0, in one place.
    return x.max(2).values if x.shape[2] else x.sum(2)


# The operator also returns what its backward needs: argmax (B, T), the class of the maximum (-1 past a length), and
# kth and last (B, C) as topk_pool does.


def _check(tcam: Tensor, lengths: Tensor | None, divisor: int, offsets: Tensor | None, t: int) -> None:
    check_pooled("tcam_pool", "tcam", tcam, lengths, divisor, offsets, t)


def _fake(
    tcam: Tensor, lengths: Tensor | None, divisor: int, offsets: Tensor | None, t: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    b, t, c = padded_shape(tcam, offsets, t)
    if offsets is None:
        attention, argmax = tcam.new_empty(b, t), tcam.new_empty(b, t, dtype=torch.int32)
    else:  # kernels leave gap rows out
        n = tcam.shape[0]
        attention, argmax = tcam.new_zeros(n), tcam.new_full((n,), -1, dtype=torch.int32)
    kth, last = _native.empty_sums(tcam, b, c), tcam.new_empty(b, c, dtype=torch.int32)
    return attention, tcam.new_empty(b, c), argmax, kth, last


def _forward(
    native: Native, tcam: Tensor, lengths: Tensor | None, divisor: int, offsets: Tensor | None, t: int
) -> tuple[Tensor, ...]:
    attention, pooled, argmax, kth, last = results = _fake(tcam, lengths, divisor, offsets, t)
    written = attention, argmax, pooled, kth, last
    native("tcam_pool", tcam, topk_struct(tcam, lengths, divisor, offsets, t, written))
    return results


def _setup_context(ctx, inputs, output) -> None:
    tcam, lengths, ctx.divisor, offsets, ctx.t = inputs
    _, _, argmax, kth, last = output
    ctx.mark_non_differentiable(argmax, kth, last)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(tcam, lengths, argmax, kth, last, offsets)


def _backward(ctx, grad_attention: Tensor | None, grad_pooled: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    none = (None,) * 4
    if grad_attention is None and grad_pooled is None:
        return None, *none
    *saved, offsets = ctx.saved_tensors
    return _tcam_pool_backward(grad_attention, grad_pooled, *saved, ctx.divisor, offsets, ctx.t), *none


def _check_backward(
    grad_attention: Tensor | None,
    grad_pooled: Tensor | None,
    tcam: Tensor,
    lengths: Tensor | None,
    argmax: Tensor,
    kth: Tensor,
    last: Tensor,
    divisor: int,
    offsets: Tensor | None,
    t: int,
) -> None:
    where = "tcam_pool_backward"
    check_pooled(where, "tcam", tcam, lengths, divisor, offsets, t)
    (b, _, c), rows = padded_shape(tcam, offsets, t), tcam.shape[:-1]
    if grad_attention is not None:
        check_like(where, "grad_attention", grad_attention, rows, tcam.dtype, tcam.device)
    if grad_pooled is not None:
        check_like(where, "grad_pooled", grad_pooled, (b, c), tcam.dtype, tcam.device)
    check_like(where, "argmax", argmax, rows, torch.int32, tcam.device)
    check_taken(where, kth, last, tcam, b)


def _gradient(
    native: Native,
    grad_attention: Tensor | None,
    grad_pooled: Tensor | None,
    tcam: Tensor,
    lengths: Tensor | None,
    argmax: Tensor,
    kth: Tensor,
    last: Tensor,
    divisor: int,
    offsets: Tensor | None,
    t: int,
) -> Tensor:
    grad_tcam = blank_like(tcam, offsets)
    saved, gradients = (None, argmax, None, kth, last), (grad_attention, grad_pooled, grad_tcam)
    native("topk_pool_backward", tcam, topk_struct(tcam, lengths, divisor, offsets, t, saved, gradients))
    return grad_tcam


def _gradient_fake(grad_attention, grad_pooled, tcam, lengths, argmax, kth, last, divisor, offsets, t) -> Tensor:
    return torch.empty_like(tcam, memory_format=torch.contiguous_format)


_tcam_pool = _library.register(
    "tcam_pool(Tensor tcam, Tensor? lengths, int divisor, Tensor? offsets, SymInt max_length)"
    " -> (Tensor attention, Tensor pooled, Tensor argmax, Tensor kth, Tensor last)",
    check=_check,
    kernel=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_tcam_pool_backward = _library.register(
    "tcam_pool_backward(Tensor? grad_attention, Tensor? grad_pooled, Tensor tcam, Tensor? lengths, Tensor argmax,"
    " Tensor kth, Tensor last, int divisor, Tensor? offsets, SymInt max_length) -> Tensor",
    check=_check_backward,
    kernel=_gradient,
    fake=_gradient_fake,
    backward=_library.refuse_double_backward,
)
