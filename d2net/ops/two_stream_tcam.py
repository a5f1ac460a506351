"""The head of D2-Net: two streams of logits to TCAM, top-down attention and pooled scores (Fig. 2)."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2net.ops import _library, _native
from d2net.ops.checks import as_tensor, as_tensors, as_whole, check_floating, check_like, check_same, within
from d2net.ops.topk_pool import check_pooled, check_taken, topk_pool_reference


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
        logits_a, logits_b: (B, T, C) outputs of the streams' last layers, floating point.
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
    return two_stream_tcam_reference(logits_a, logits_b, lengths, divisor=divisor)


def two_stream_tcam_reference(
    logits_a: Tensor, logits_b: Tensor, lengths: Tensor | None = None, *, divisor: int = 8
) -> TCAM:
    """:func:`two_stream_tcam` in plain PyTorch, on any device, without checks."""
    past = ~within(logits_a, lengths)[:, :, None]
    # Masked first and last: the gradient of a sigmoid of NaN would be NaN even times 0.
    a, b = (x.masked_fill(past, 0).sigmoid() for x in (logits_a, logits_b))
    tcam = (0.5 * (a + b)).masked_fill(past, 0)
    return TCAM(tcam, *tcam_pool_reference(tcam, lengths, divisor=divisor))


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
    return tcam_pool_reference(tcam, lengths, divisor=divisor)


def tcam_pool_reference(tcam: Tensor, lengths: Tensor | None = None, *, divisor: int = 8) -> TCAMPool:
    """:func:`tcam_pool` in plain PyTorch, on any device, without checks."""
    inside = tcam.masked_fill(~within(tcam, lengths)[:, :, None], 0)
    return TCAMPool(class_max(inside), topk_pool_reference(inside, lengths, divisor=divisor))


def class_max(x: Tensor) -> Tensor:
    """(B, T) maxima over the classes of (B, T, C), in plain PyTorch; 0 where there are none."""
    # `max` over one dimension gives the gradient to the first maximum, where `amax` shares it among equals, and so
    # leaves that of a padded NaN, which is 0, in one place.
    return x.max(2).values if x.shape[2] else x.sum(2)


# Both operators also return what their backward needs: peak (B, T), the class of the maximum (-1 past a length), and
# kth and last (B, C) as topk_pool does.


def _check_pool(tcam: Tensor, lengths: Tensor | None, divisor: int) -> None:
    check_pooled("tcam_pool", "tcam", tcam, lengths, divisor)


def _pool_cpu(tcam: Tensor, lengths: Tensor | None, divisor: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide, (b, t, c) = _native.plain(tcam), tcam.shape
    attention, peak, pooled, kth, last = _empty_pool(wide)
    lengths = _native.plain_lengths(lengths)
    _native.cpu("tcam_pool", wide.dtype, wide, lengths, b, t, c, divisor, attention, peak, pooled, kth, last)
    return attention.to(tcam.dtype), pooled.to(tcam.dtype), peak, kth, last


def _empty_pool(tcam: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """attention, peak, pooled, kth and last for ``tcam``, uninitialised."""
    b, t, c = tcam.shape
    return (
        tcam.new_empty(b, t),
        tcam.new_empty(b, t, dtype=torch.int32),
        tcam.new_empty(b, c),
        tcam.new_empty(b, c, dtype=_native.accumulator(tcam.dtype)),
        tcam.new_empty(b, c, dtype=torch.int32),
    )


def _pool_cuda(tcam: Tensor, lengths: Tensor | None, divisor: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tcam, lengths = tcam.contiguous(), _native.plain_lengths(lengths)
    attention, peak, pooled, kth, last = results = _empty_pool(tcam)
    _native.cuda("tcam_pool", tcam.dtype, tcam.device, tcam, lengths, *tcam.shape, divisor, *results)
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


def _native_gradient(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else _native.plain(grad)


def _pool_backward_cpu(
    grad_attention: Tensor | None,
    grad_pooled: Tensor | None,
    tcam: Tensor,
    lengths: Tensor | None,
    peak: Tensor,
    kth: Tensor,
    last: Tensor,
    divisor: int,
) -> Tensor:
    wide, (b, t, c) = _native.plain(tcam), tcam.shape
    out, lengths = torch.empty_like(wide), _native.plain_lengths(lengths)
    grads = [_native_gradient(g) for g in (grad_attention, grad_pooled)]
    saved = wide, lengths, *_native.contiguous(peak, kth, last)
    _native.cpu("tcam_pool_backward", wide.dtype, *grads, *saved, b, t, c, divisor, out)
    return out.to(tcam.dtype)


def _pool_backward_cuda(
    grad_attention: Tensor | None,
    grad_pooled: Tensor | None,
    tcam: Tensor,
    lengths: Tensor | None,
    peak: Tensor,
    kth: Tensor,
    last: Tensor,
    divisor: int,
) -> Tensor:
    tcam, lengths = tcam.contiguous(), _native.plain_lengths(lengths)
    grads, saved = _native.contiguous(grad_attention, grad_pooled), _native.contiguous(peak, kth, last)
    out, saved = torch.empty_like(tcam), [tcam, lengths, *saved]
    _native.cuda("tcam_pool_backward", tcam.dtype, tcam.device, *grads, *saved, *tcam.shape, divisor, out)
    return out


def _pool_backward_fake(
    grad_attention: Tensor | None,
    grad_pooled: Tensor | None,
    tcam: Tensor,
    lengths: Tensor | None,
    peak: Tensor,
    kth: Tensor,
    last: Tensor,
    divisor: int,
) -> Tensor:
    return torch.empty_like(tcam, memory_format=torch.contiguous_format)


_tcam_pool = _library.register(
    "tcam_pool(Tensor tcam, Tensor? lengths, int divisor)"
    " -> (Tensor attention, Tensor pooled, Tensor peak, Tensor kth, Tensor last)",
    check=_check_pool,
    cpu=_pool_cpu,
    cuda=_pool_cuda,
    fake=_pool_fake,
    setup_context=_pool_setup_context,
    backward=_pool_backward,
)
_tcam_pool_backward = _library.register(
    "tcam_pool_backward(Tensor? grad_attention, Tensor? grad_pooled, Tensor tcam, Tensor? lengths, Tensor peak,"
    " Tensor kth, Tensor last, int divisor) -> Tensor",
    check=_check_pool_backward,
    cpu=_pool_backward_cpu,
    cuda=_pool_backward_cuda,
    fake=_pool_backward_fake,
    backward=_library.refuse_double_backward,
)


def _check(logits_a: Tensor, logits_b: Tensor, lengths: Tensor | None, divisor: int) -> None:
    check_pooled("two_stream_tcam", "logits_a", logits_a, lengths, divisor)
    check_same("two_stream_tcam", "logits_a", logits_a, "logits_b", logits_b)


def _cpu(
    logits_a: Tensor, logits_b: Tensor, lengths: Tensor | None, divisor: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    a, b_, (b, t, c) = _native.plain(logits_a), _native.plain(logits_b), logits_a.shape
    tcam, lengths = torch.empty_like(a), _native.plain_lengths(lengths)
    attention, peak, pooled, kth, last = _empty_pool(a)
    _native.cpu("two_stream_tcam", a.dtype, a, b_, lengths, b, t, c, divisor, tcam, attention, peak, pooled, kth, last)
    if a.dtype == logits_a.dtype:
        return tcam, attention, pooled, peak, kth, last
    # Half precision: the maximum and the selection are those of the rounded TCAM that is returned.
    tcam = tcam.to(logits_a.dtype)
    return tcam, *_pool_cpu(tcam, lengths, divisor)


def _cuda(
    logits_a: Tensor, logits_b: Tensor, lengths: Tensor | None, divisor: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    a, b, lengths = logits_a.contiguous(), logits_b.contiguous(), _native.plain_lengths(lengths)
    tcam = torch.empty_like(a)
    attention, peak, pooled, kth, last = results = _empty_pool(a)
    _native.cuda("two_stream_tcam", a.dtype, a.device, a, b, lengths, *a.shape, divisor, tcam, *results)
    return tcam, attention, pooled, peak, kth, last


def _fake(
    logits_a: Tensor, logits_b: Tensor, lengths: Tensor | None, divisor: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tcam = torch.empty_like(logits_a, memory_format=torch.contiguous_format)
    return tcam, *_pool_fake(tcam, lengths, divisor)


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


def _backward_cpu(
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
    a, b_, wide, (b, t, c) = _native.plain(logits_a), _native.plain(logits_b), _native.plain(tcam), tcam.shape
    grads = [_native_gradient(g) for g in (grad_tcam, grad_attention, grad_pooled)]
    grad_a, grad_b, lengths = torch.empty_like(a), torch.empty_like(a), _native.plain_lengths(lengths)
    saved = a, b_, wide, lengths, *_native.contiguous(peak, kth, last)
    _native.cpu("two_stream_tcam_backward", a.dtype, *grads, *saved, b, t, c, divisor, grad_a, grad_b)
    return grad_a.to(logits_a.dtype), grad_b.to(logits_b.dtype)


def _backward_cuda(
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
    a, b, tcam = logits_a.contiguous(), logits_b.contiguous(), tcam.contiguous()
    grads = _native.contiguous(grad_tcam, grad_attention, grad_pooled)
    saved = a, b, tcam, _native.plain_lengths(lengths), *_native.contiguous(peak, kth, last)
    grad_a, grad_b = torch.empty_like(a), torch.empty_like(a)
    _native.cuda("two_stream_tcam_backward", a.dtype, a.device, *grads, *saved, *a.shape, divisor, grad_a, grad_b)
    return grad_a, grad_b


def _backward_fake(
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
    gradient = tcam.new_empty(tcam.shape)
    return gradient, torch.empty_like(gradient)


_two_stream_tcam = _library.register(
    "two_stream_tcam(Tensor logits_a, Tensor logits_b, Tensor? lengths, int divisor)"
    " -> (Tensor tcam, Tensor attention, Tensor pooled, Tensor peak, Tensor kth, Tensor last)",
    check=_check,
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_two_stream_tcam_backward = _library.register(
    "two_stream_tcam_backward(Tensor? grad_tcam, Tensor? grad_attention, Tensor? grad_pooled, Tensor logits_a,"
    " Tensor logits_b, Tensor tcam, Tensor? lengths, Tensor peak, Tensor kth, Tensor last, int divisor)"
    " -> (Tensor, Tensor)",
    check=_check_backward,
    cpu=_backward_cpu,
    cuda=_backward_cuda,
    fake=_backward_fake,
    backward=_library.refuse_double_backward,
)
