"""The head of D2-Net: two streams of logits to TCAM, top-down attention and pooled scores (Fig. 2)."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2net.ops import _library, _native
from d2net.ops._native import Native
from d2net.ops.checks import COMPUTED, as_tensor, as_tensors, as_whole, check_floating, check_like, check_same, within
from d2net.ops.topk_pool import check_pooled, check_taken, topk_pool_ref, topk_struct


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
    """What is derived from temporal class activation maps.

    Attributes:
        attention: (B, T) top-down foreground attention, the maximum over classes; 0 past the length.
        pooled: (B, C) video-level prediction p.
    """

    attention: Tensor
    pooled: Tensor


def two_stream_tcam(logits_a: Tensor, logits_b: Tensor, lengths: Tensor | None = None, *, divisor: int = 8) -> TCAM:
    """T = (sigmoid(a) + sigmoid(b)) / 2, lambda(t) = max_c T[t, c], p = topk_pool(T).

    Args:
        logits_a: (B, T, C) output of the first stream's last layer, floating point.
        logits_b: the same of the second stream.
        lengths: (B,) int64, or None (all T).
        divisor: see :func:`topk_pool`.

    Returns:
        TCAM(tcam (B, T, C), attention (B, T), pooled (B, C)), of the logits' dtype. NaN propagates, and of equal class
        maxima the lower class gets the gradient of attention. Differentiable once.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, T or C of 2^31 or more, or a divisor that is no whole
            number >= 1.
    """
    logits_a, logits_b = as_tensors("two_stream_tcam", logits_a=logits_a, logits_b=logits_b)
    divisor = as_whole("two_stream_tcam", "divisor", divisor)
    lengths = None if lengths is None else as_tensor("two_stream_tcam", "lengths", lengths, logits_a)
    if logits_a.dtype != logits_b.dtype:
        check_floating("two_stream_tcam", "logits_a", logits_a)
        check_floating("two_stream_tcam", "logits_b", logits_b)
        dtype = torch.promote_types(logits_a.dtype, logits_b.dtype)
        logits_a, logits_b = logits_a.to(dtype), logits_b.to(dtype)
    if _library.has_kernel("two_stream_tcam", logits_a):
        return TCAM(*_two_stream_tcam(logits_a, logits_b, lengths, divisor)[:3])
    _check(logits_a, logits_b, lengths, divisor)
    return two_stream_tcam_ref(logits_a, logits_b, lengths, divisor=divisor)


def two_stream_tcam_ref(logits_a: Tensor, logits_b: Tensor, lengths: Tensor | None = None, *, divisor: int = 8) -> TCAM:
    """:func:`two_stream_tcam` in plain PyTorch, on any device, without checks."""
    past = ~within(logits_a, lengths)[:, :, None]
    # Masked first and last: the gradient of a sigmoid of NaN would be NaN even times 0.
    a, b = (x.masked_fill(past, 0).sigmoid() for x in (logits_a, logits_b))
    tcam = (0.5 * (a + b)).masked_fill(past, 0)
    return TCAM(tcam, *tcam_pool_ref(tcam, lengths, divisor=divisor))


def tcam_pool(tcam: Tensor, lengths: Tensor | None = None, *, divisor: int = 8) -> TCAMPool:
    """lambda(t) = max_c T[t, c] and p = topk_pool(T) of a ready TCAM, with one backward for both.

    Args:
        tcam: (B, T, C) class activations, floating point.
        lengths: (B,) int64, or None (all T).
        divisor: see :func:`topk_pool`.

    Returns:
        TCAMPool(attention (B, T), pooled (B, C)); attention is 0 past a length and where there are no classes. NaN is
        larger than every number. Of equal class maxima the lower class gets the gradient. Differentiable once.

    Raises:
        InputError: wrong shape, dtype or device, T or C of 2^31 or more, or a divisor that is no whole number >= 1.
    """
    tcam, divisor = as_tensor("tcam_pool", "tcam", tcam), as_whole("tcam_pool", "divisor", divisor)
    lengths = None if lengths is None else as_tensor("tcam_pool", "lengths", lengths, tcam)
    if _library.has_kernel("tcam_pool", tcam):
        return TCAMPool(*_tcam_pool(tcam, lengths, divisor)[:2])
    _check_pool(tcam, lengths, divisor)
    return tcam_pool_ref(tcam, lengths, divisor=divisor)


def tcam_pool_ref(tcam: Tensor, lengths: Tensor | None = None, *, divisor: int = 8) -> TCAMPool:
    """:func:`tcam_pool` in plain PyTorch, on any device, without checks."""
    inside = tcam.masked_fill(~within(tcam, lengths)[:, :, None], 0)
    return TCAMPool(class_max(inside), topk_pool_ref(inside, lengths, divisor=divisor))


def class_max(x: Tensor) -> Tensor:
    """(B, T) maxima over the classes of (B, T, C), in plain PyTorch; 0 where there are none."""
    # `max` over one dimension gives the gradient to the first maximum, where `amax` shares it among equals, and so
    # leaves that of a padded NaN, which is 0, in one place.
    return x.max(2).values if x.shape[2] else x.sum(2)


# Both operators also return what their backward needs: peak (B, T), the class of the maximum (-1 past a length), and
# kth and last (B, C) as topk_pool does.


def _check_pool(tcam: Tensor, lengths: Tensor | None, divisor: int) -> None:
    check_pooled("tcam_pool", "tcam", tcam, lengths, divisor)


def _empty_pool(tcam: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """attention, peak, pooled, kth and last for ``tcam``, uninitialised."""
    b, t, c = tcam.shape
    return (
        tcam.new_empty(b, t),
        tcam.new_empty(b, t, dtype=torch.int32),
        tcam.new_empty(b, c),
        _native.empty_sums(tcam, b, c),
        tcam.new_empty(b, c, dtype=torch.int32),
    )


def _pool_forward(native: Native, tcam: Tensor, lengths: Tensor | None, divisor: int) -> tuple[Tensor, ...]:
    attention, peak, pooled, kth, last = results = _empty_pool(tcam)
    native("tcam_pool", tcam, topk_struct(tcam, lengths, divisor, results))
    return attention, pooled, peak, kth, last


def _pool_fake(tcam: Tensor, lengths: Tensor | None, divisor: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    attention, peak, pooled, kth, last = _empty_pool(tcam)
    return attention, pooled, peak, kth, last


def _pool_setup_context(ctx, inputs, output) -> None:
    tcam, lengths, ctx.divisor = inputs
    _, _, peak, kth, last = output
    ctx.mark_non_differentiable(peak, kth, last)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(tcam, lengths, peak, kth, last)


def _pool_backward(
    ctx, grad_attention: Tensor | None, grad_pooled: Tensor | None, *_
) -> tuple[Tensor | None, None, None]:
    if grad_attention is None and grad_pooled is None:
        return None, None, None
    return _tcam_pool_backward(grad_attention, grad_pooled, *ctx.saved_tensors, ctx.divisor), None, None


def _check_saved(
    operator: str,
    grad_attention: Tensor | None,
    grad_pooled: Tensor | None,
    tcam: Tensor,
    lengths: Tensor | None,
    peak: Tensor,
    kth: Tensor,
    last: Tensor,
    divisor: int,
) -> None:
    check_pooled(operator, "tcam", tcam, lengths, divisor)
    b, t, c = tcam.shape
    if grad_attention is not None:
        check_like(operator, "grad_attention", grad_attention, (b, t), tcam.dtype, tcam.device)
    if grad_pooled is not None:
        check_like(operator, "grad_pooled", grad_pooled, (b, c), tcam.dtype, tcam.device)
    check_like(operator, "peak", peak, (b, t), torch.int32, tcam.device)
    check_taken(operator, kth, last, tcam)


_check_pool_backward = partial(_check_saved, "tcam_pool_backward")


def _pool_gradient(
    native: Native,
    grad_attention: Tensor | None,
    grad_pooled: Tensor | None,
    tcam: Tensor,
    lengths: Tensor | None,
    peak: Tensor,
    kth: Tensor,
    last: Tensor,
    divisor: int,
) -> Tensor:
    grad_tcam = torch.empty_like(tcam)
    saved, gradients = (None, peak, None, kth, last), (None, grad_attention, grad_pooled, grad_tcam)
    native("topk_pool_backward", tcam, topk_struct(tcam, lengths, divisor, saved, gradients))
    return grad_tcam


def _pool_gradient_fake(grad_attention, grad_pooled, tcam, lengths, peak, kth, last, divisor) -> Tensor:
    return torch.empty_like(tcam, memory_format=torch.contiguous_format)


_tcam_pool = _library.register(
    "tcam_pool(Tensor tcam, Tensor? lengths, int divisor)"
    " -> (Tensor attention, Tensor pooled, Tensor peak, Tensor kth, Tensor last)",
    check=_check_pool,
    kernel=_pool_forward,
    fake=_pool_fake,
    setup_context=_pool_setup_context,
    backward=_pool_backward,
)
_tcam_pool_backward = _library.register(
    "tcam_pool_backward(Tensor? grad_attention, Tensor? grad_pooled, Tensor tcam, Tensor? lengths, Tensor peak,"
    " Tensor kth, Tensor last, int divisor) -> Tensor",
    check=_check_pool_backward,
    kernel=_pool_gradient,
    fake=_pool_gradient_fake,
    backward=_library.refuse_double_backward,
)


def _check(logits_a: Tensor, logits_b: Tensor, lengths: Tensor | None, divisor: int) -> None:
    check_pooled("two_stream_tcam", "logits_a", logits_a, lengths, divisor)
    check_same("two_stream_tcam", "logits_a", logits_a, "logits_b", logits_b)


def _forward(
    native: Native, logits_a: Tensor, logits_b: Tensor, lengths: Tensor | None, divisor: int
) -> tuple[Tensor, ...]:
    tcam = torch.empty_like(logits_a)
    attention, peak, pooled, kth, last = results = _empty_pool(tcam)
    pool = topk_struct(tcam, lengths, divisor, results)
    native("two_stream_tcam", tcam, (*pool, logits_a, logits_b, tcam, None, None))
    return tcam, attention, pooled, peak, kth, last


def _cpu(logits_a: Tensor, logits_b: Tensor, lengths: Tensor | None, divisor: int) -> tuple[Tensor, ...]:
    tcam, *pooled = _on_cpu(logits_a, logits_b, lengths, divisor)
    if tcam.dtype not in COMPUTED:  # the maximum and the selection are those of the rounded TCAM that is returned
        pooled = _library.KERNELS["tcam_pool"]["cpu"](tcam, lengths, divisor)
    return tcam, *pooled


def _fake(logits_a: Tensor, logits_b: Tensor, lengths: Tensor | None, divisor: int) -> tuple[Tensor, ...]:
    tcam = torch.empty_like(logits_a, memory_format=torch.contiguous_format)
    return tcam, *_pool_fake(tcam, lengths, divisor)


_on_cpu = _native.reading(_native.on_cpu, _forward, _fake, (0, 1, 2), 2)


def _setup_context(ctx, inputs, output) -> None:
    logits_a, logits_b, lengths, ctx.divisor = inputs
    tcam, _, _, peak, kth, last = output
    ctx.mark_non_differentiable(peak, kth, last)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits_a, logits_b, tcam, lengths, peak, kth, last)


def _backward(
    ctx, grad_tcam: Tensor | None, grad_attention: Tensor | None, grad_pooled: Tensor | None, *_
) -> tuple[Tensor | None, Tensor | None, None, None]:
    if grad_tcam is None and grad_attention is None and grad_pooled is None:
        return None, None, None, None
    grads = grad_tcam, grad_attention, grad_pooled
    return *_two_stream_tcam_backward(*grads, *ctx.saved_tensors, ctx.divisor), None, None


def _check_backward(
    grad_tcam: Tensor | None,
    grad_attention: Tensor | None,
    grad_pooled: Tensor | None,
    logits_a: Tensor,
    logits_b: Tensor,
    tcam: Tensor,
    *saved: Any,
) -> None:
    where = "two_stream_tcam_backward"
    _check_saved(where, grad_attention, grad_pooled, tcam, *saved)
    if grad_tcam is not None:
        check_like(where, "grad_tcam", grad_tcam, tcam.shape, tcam.dtype, tcam.device)
    check_like(where, "logits_a", logits_a, tcam.shape, tcam.dtype, tcam.device)
    check_like(where, "logits_b", logits_b, tcam.shape, tcam.dtype, tcam.device)


def _gradient(
    native: Native,
    grad_tcam: Tensor | None,
    grad_attention: Tensor | None,
    grad_pooled: Tensor | None,
    logits_a: Tensor,
    logits_b: Tensor,
    tcam: Tensor,
    lengths: Tensor | None,
    peak: Tensor,
    kth: Tensor,
    last: Tensor,
    divisor: int,
) -> tuple[Tensor, Tensor]:
    grad_a, grad_b = torch.empty_like(tcam), torch.empty_like(tcam)
    saved, gradients = (None, peak, None, kth, last), (grad_tcam, grad_attention, grad_pooled, None)
    pool = topk_struct(tcam, lengths, divisor, saved, gradients)
    native("two_stream_tcam_backward", tcam, (*pool, logits_a, logits_b, None, grad_a, grad_b))
    return grad_a, grad_b


def _gradient_fake(
    grad_tcam, grad_attention, grad_pooled, logits_a, logits_b, tcam, lengths, peak, kth, last, divisor
) -> tuple[Tensor, Tensor]:
    gradient = tcam.new_empty(tcam.shape)
    return gradient, torch.empty_like(gradient)


_two_stream_tcam = _library.register(
    "two_stream_tcam(Tensor logits_a, Tensor logits_b, Tensor? lengths, int divisor)"
    " -> (Tensor tcam, Tensor attention, Tensor pooled, Tensor peak, Tensor kth, Tensor last)",
    check=_check,
    kernel=_forward,
    cpu=_cpu,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_two_stream_tcam_backward = _library.register(
    "two_stream_tcam_backward(Tensor? grad_tcam, Tensor? grad_attention, Tensor? grad_pooled, Tensor logits_a,"
    " Tensor logits_b, Tensor tcam, Tensor? lengths, Tensor peak, Tensor kth, Tensor last, int divisor)"
    " -> (Tensor, Tensor)",
    check=_check_backward,
    kernel=_gradient,
    fake=_gradient_fake,
    backward=_library.refuse_double_backward,
)
