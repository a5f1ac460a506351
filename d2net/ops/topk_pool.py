"""Temporal top-k pooling: recording-level scores from snippet-level activations (Sec. 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from d2net.errors import InputError
from d2net.ops import _library, _native
from d2net.ops._native import Members, Native
from d2net.ops.checks import as_tensor, as_whole, check_floating, check_lengths, check_like, within
from d2net.ops.packed import as_offsets, as_padded, blank_like, check_rows, padded_shape


def topk_pool(
    x: Tensor,
    lengths: Tensor | None = None,
    *,
    divisor: int = 8,
    offsets: Tensor | None = None,
    max_length: int | None = None,
) -> Tensor:
    """Mean of the k largest values over time, k = max(1, ceil(length / divisor)), per recording.

    Args:
        x: (B, T, C) activations, floating point.
        lengths: (B,) int64, the number of snippets of each recording, or None (all T). Later snippets never matter. A
            length outside [0, T] is clamped to it.
        divisor: one snippet in so many is selected; 8 in the paper.
        offsets: (B+1,) int64 of a packed batch, or None. Recording b has the rows of x (N, C) from offsets[b] on; see
            :mod:`d2net.ops.packed`.
        max_length: of a packed batch, an upper bound of the lengths; None: N. Longer recordings are cut.

    Returns:
        (B, C) pooled scores; 0 for a recording of length 0. Of equal values the earlier snippet is selected. NaN counts
        as larger than every number, so it propagates. Half precision is summed in float32 or wider. Differentiable
        once: the gradient is 1 / k at the selected snippets.

    Raises:
        InputError: wrong shape, dtype or device, T or C of 2^31 or more, a divisor that is no whole number >= 1, or
            offsets that are wrong (see :func:`~d2net.ops.packed.as_offsets`).
    """
    x, divisor = as_tensor("topk_pool", "x", x), as_whole("topk_pool", "divisor", divisor)
    lengths = None if lengths is None else as_tensor("topk_pool", "lengths", lengths, x)
    offsets, t = as_offsets("topk_pool", offsets, max_length, x)
    if _library.has_kernel("topk_pool", x):
        return _topk_pool(x, lengths, divisor, offsets, t)[0]
    _check(x, lengths, divisor, offsets, t)
    lengths, (x,) = as_padded(offsets, lengths, t, x)
    return topk_pool_ref(x, lengths, divisor=divisor)


def topk_pool_ref(x: Tensor, lengths: Tensor | None = None, *, divisor: int = 8) -> Tensor:
    """:func:`topk_pool` in plain PyTorch, on any device, without checks."""
    t = x.shape[1]
    mask = within(x, lengths)
    length = mask.sum(1)
    k = ((length + divisor - 1) // divisor).clamp(min=1)
    largest_k = max(1, -(-t // divisor)) if t else 0  # the k of a recording of length T
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    ordered, _ = wide.masked_fill(~mask[:, :, None], -torch.inf).sort(dim=1, descending=True, stable=True)
    selected = torch.arange(largest_k, device=x.device)[None, :] < torch.minimum(k, length)[:, None]
    top = torch.where(selected[:, :, None], ordered[:, :largest_k], 0)
    return (top.sum(1) / k[:, None]).to(x.dtype)


def _check(x: Tensor, lengths: Tensor | None, divisor: int, offsets: Tensor | None, t: int) -> None:
    check_pooled("topk_pool", "x", x, lengths, divisor, offsets, t)


def check_pooled(
    operator: str, name: str, x: Tensor, lengths: Tensor | None, divisor: int, offsets: Tensor | None, t: int
) -> None:
    """The checks of every operator that pools activations ``x`` over time."""
    check_rows(operator, name, x, "B, T, C", offsets, t)
    check_floating(operator, name, x)
    check_lengths(operator, lengths, x, offsets=offsets)
    if x.shape[-2] >= 2**31 or x.shape[-1] >= 2**31:
        raise InputError(f"{operator}: {name} has shape {tuple(x.shape)}; T and C must be below 2^31")
    if divisor < 1:
        raise InputError(f"{operator}: divisor is {divisor}, expected at least 1")


def check_taken(operator: str, kth: Tensor, last: Tensor, x: Tensor, b: int) -> None:
    """The checks of ``kth`` and ``last`` (see the end of this file), which a forward saves for its backward."""
    shape, device = (b, x.shape[-1]), x.device
    check_like(operator, "kth", kth, shape, _native.accumulator(x.dtype), device)
    check_like(operator, "last", last, shape, torch.int32, device)


def topk_struct(
    x: Tensor,
    lengths: Tensor | None,
    divisor: int,
    offsets: Tensor | None,
    t: int,
    results: Members,
    gradients: Members = (None,) * 3,
) -> Members:
    """The members of TopkPool of csrc/topk_pool.h.

    Args:
        x: (B, T, C), or (N, C) with offsets.
        lengths: (B,), or None.
        divisor: As for :func:`topk_pool`.
        offsets: (B+1,), or None.
        t: T of a packed batch.
        results: attention, its argmax over classes, pooled, kth and last; None for those that are not wanted.
        gradients: with respect to attention and to pooled, and the result, grad_x.
    """
    sizes = padded_shape(x, offsets, t)
    return x, lengths, *sizes, divisor, *results, *gradients, offsets, x.shape[0]


def _forward(
    native: Native, x: Tensor, lengths: Tensor | None, divisor: int, offsets: Tensor | None, t: int
) -> tuple[Tensor, Tensor, Tensor]:
    results = _fake(x, lengths, divisor, offsets, t)
    native("topk_pool", x, topk_struct(x, lengths, divisor, offsets, t, (None, None, *results)))
    return results


def _fake(
    x: Tensor, lengths: Tensor | None, divisor: int, offsets: Tensor | None, t: int
) -> tuple[Tensor, Tensor, Tensor]:
    b, _, c = padded_shape(x, offsets, t)
    return x.new_empty(b, c), _native.empty_sums(x, b, c), x.new_empty(b, c, dtype=torch.int32)


def _setup_context(ctx, inputs, output) -> None:
    x, lengths, ctx.divisor, offsets, ctx.t = inputs
    _, kth, last = output
    ctx.mark_non_differentiable(kth, last)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, lengths, kth, last, offsets)


def _backward(ctx, grad: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    none = (None,) * 4
    if grad is None:
        return None, *none
    *saved, offsets = ctx.saved_tensors
    return _topk_pool_backward(grad, *saved, ctx.divisor, offsets, ctx.t), *none


def _check_backward(
    grad: Tensor,
    x: Tensor,
    lengths: Tensor | None,
    kth: Tensor,
    last: Tensor,
    divisor: int,
    offsets: Tensor | None,
    t: int,
) -> None:
    check_pooled("topk_pool_backward", "x", x, lengths, divisor, offsets, t)
    b, _, c = padded_shape(x, offsets, t)
    check_like("topk_pool_backward", "grad", grad, (b, c), x.dtype, x.device)
    check_taken("topk_pool_backward", kth, last, x, b)


def _gradient(
    native: Native,
    grad: Tensor,
    x: Tensor,
    lengths: Tensor | None,
    kth: Tensor,
    last: Tensor,
    divisor: int,
    offsets: Tensor | None,
    t: int,
) -> Tensor:
    grad_x = blank_like(x, offsets)
    saved, gradients = (None, None, None, kth, last), (None, grad, grad_x)
    native("topk_pool_backward", x, topk_struct(x, lengths, divisor, offsets, t, saved, gradients))
    return grad_x


def _gradient_fake(grad, x, lengths, kth, last, divisor, offsets, t) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# `kth` and `last` (B, C) are the value and the snippet of the k-th entry by falling value and, among equal values, by
# rising time. They tell which entries were selected. For a recording of length 0 they are 0 and -1. For half precision
# kth is float32.
_topk_pool = _library.register(
    "topk_pool(Tensor x, Tensor? lengths, int divisor, Tensor? offsets, SymInt max_length)"
    " -> (Tensor pooled, Tensor kth, Tensor last)",
    check=_check,
    kernel=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_topk_pool_backward = _library.register(
    "topk_pool_backward(Tensor grad, Tensor x, Tensor? lengths, Tensor kth, Tensor last, int divisor,"
    " Tensor? offsets, SymInt max_length) -> Tensor",
    check=_check_backward,
    kernel=_gradient,
    fake=_gradient_fake,
    backward=_library.refuse_double_backward,
)
