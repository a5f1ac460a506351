"""Foreground and background embeddings by attention (Eq. 2)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from d2net.errors import InputError
from d2net.ops import _library, _native
from d2net.ops._native import Native
from d2net.ops.checks import (
    as_number,
    as_tensor,
    as_tensors,
    check_choice,
    check_floating,
    check_lengths,
    check_like,
    check_numbers,
    check_same,
    within,
)
from d2net.ops.packed import as_offsets, as_padded, blank_like, check_rows, padded_shape
from d2net.ops.precision import product

_CHUNK = 32  # kPoolChunk of csrc/attention_pool.h


class Pooled(NamedTuple):
    """Foreground and background embeddings of a batch.

    Attributes:
        x_fg: (B, D) foreground embeddings.
        x_bg: (B, D) background embeddings.
        valid_fg: (B,) bool, whether any snippet contributed to x_fg.
        valid_bg: (B,) bool, whether any snippet contributed to x_bg.
    """

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
    offsets: Tensor | None = None,
    max_length: int | None = None,
) -> Pooled:
    """Weighted temporal pooling of embeddings into one foreground and one background vector (Eq. 2).

    Foreground weights are lambda where lambda > threshold, background weights 1 - lambda where
    1 - lambda > background_threshold. All other snippets are left out, so that a NaN in them does not matter; so are
    those whose lambda is NaN. NaN in a selected snippet propagates. Weights have a gradient, the selection has none.

    Args:
        x: (B, T, D) embeddings.
        attention: (B, T) foreground attention lambda in [0, 1]; converted to float32, or to float64 if x is float64.
        lengths: (B,) int64, or None (all T).
        threshold: tau on the foreground attention lambda.
        background_threshold: tau on the background attention 1 - lambda.
        reduction: "sum" as in the paper, or "mean": divided by the sum of the weights.
        offsets: (B+1,) int64 of a packed batch, or None. Recording b has the rows of x (N, D) and attention (N,) from
            offsets[b] on; see :mod:`d2net.ops.packed`.
        max_length: of a packed batch, an upper bound of the lengths; None: N. Longer recordings are cut.

    Returns:
        Pooled(x_fg (B, D), x_bg (B, D), valid_fg (B,), valid_bg (B,)); x_fg and x_bg are 0 where not valid. They are in
        the dtype of the sums, float32 for half precision: a sum over time soon exceeds the largest float16.
        Differentiable once with respect to x and attention.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, a threshold that is no number, an unknown reduction, or
            offsets that are wrong (see :func:`~d2net.ops.packed.as_offsets`).
    """
    x, attention = as_tensors("attention_pool", x=x, attention=attention)
    lengths = None if lengths is None else as_tensor("attention_pool", "lengths", lengths, x)
    check_choice("attention_pool: reduction", reduction, "sum", "mean")
    threshold = as_number("attention_pool", "threshold", threshold)
    background_threshold = as_number("attention_pool", "background_threshold", background_threshold)
    check_floating("attention_pool", "attention", attention)
    attention = attention.to(_native.accumulator(x.dtype))
    offsets, t = as_offsets("attention_pool", offsets, max_length, x)
    settings = threshold, background_threshold, reduction == "mean"
    if _library.has_kernel("attention_pool", x):
        return Pooled(*_attention_pool(x, attention, lengths, *settings, offsets, t))
    _check(x, attention, lengths, *settings, offsets, t)
    lengths, (x, attention) = as_padded(offsets, lengths, t, x, attention)
    return Pooled(*attention_pool_ref(x, attention, lengths, *settings))


def attention_pool_ref(
    x: Tensor,
    attention: Tensor,
    lengths: Tensor | None,
    threshold: float,
    background_threshold: float,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`attention_pool` in plain PyTorch, on any device, without checks; attention in float32 or float64."""
    mask = within(x, lengths)
    pooled, valid = [], []
    for lam, above in ((attention, threshold), (1 - attention, background_threshold)):
        selected = mask & (lam > above)
        weights = torch.where(selected, lam, 0)
        rows = x.to(lam.dtype).masked_fill(~selected[:, :, None], 0)  # NaN times a weight of 0 is NaN
        total = weights.sum(1)
        vector = product(weights[:, None], rows)[:, 0]
        if mean:
            vector = vector / torch.where(total > 0, total, 1)[:, None]
        pooled.append(vector)
        valid.append(total > 0)
    return pooled[0], pooled[1], valid[0], valid[1]


def _check(
    x: Tensor,
    attention: Tensor,
    lengths: Tensor | None,
    threshold: float,
    background_threshold: float,
    mean: bool,
    offsets: Tensor | None,
    t: int,
    operator: str = "attention_pool",
) -> None:
    check_rows(operator, "x", x, "B, T, D", offsets, t)
    check_rows(operator, "attention", attention, "B, T", offsets, t)
    check_floating(operator, "x", x)
    check_same(operator, "x", x, "attention", attention, attention.ndim)
    if attention.dtype is not _native.accumulator(x.dtype):
        raise InputError(f"{operator}: attention has dtype {attention.dtype}, which does not go with {x.dtype} of x")
    check_lengths(operator, lengths, x, offsets=offsets)
    check_numbers(operator, threshold=threshold, background_threshold=background_threshold)


def _forward(
    native: Native,
    x: Tensor,
    attention: Tensor,
    lengths: Tensor | None,
    threshold: float,
    background_threshold: float,
    mean: bool,
    offsets: Tensor | None,
    t: int,
) -> tuple[Tensor, ...]:
    fg, bg, valid_fg, valid_bg = results = _fake(
        x, attention, lengths, threshold, background_threshold, mean, offsets, t
    )
    b, t, d = padded_shape(x, offsets, t)
    partial = arrived = none = None
    if native is _native.on_cuda:
        partial = attention.new_empty(b, -(-t // _CHUNK), 2, d)
        arrived = x.new_empty(b * (d // 32 + 1), dtype=torch.int32)
    inputs = threshold, background_threshold, mean, x, attention, lengths, b, t, d
    scratch = partial, arrived, none, none, none, none, none
    members = *inputs, fg, bg, valid_fg, valid_bg, *scratch, offsets, x.shape[0]
    native("attention_pool", x, members)
    return results


def _fake(x, attention, lengths, threshold, background_threshold, mean, offsets, t) -> tuple[Tensor, ...]:
    (b, _, d), flag = padded_shape(x, offsets, t), torch.bool
    return attention.new_empty(b, d), attention.new_empty(b, d), x.new_empty(b, dtype=flag), x.new_empty(b, dtype=flag)


def _setup_context(ctx, inputs, output) -> None:
    x, attention, lengths, ctx.threshold, ctx.background_threshold, ctx.mean, offsets, ctx.t = inputs
    fg, bg = output[:2] if ctx.mean else (None, None)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, attention, lengths, fg, bg, offsets)


def _backward(ctx, grad_fg: Tensor | None, grad_bg: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    either = grad_bg if grad_fg is None else grad_fg
    if either is None:
        return (None,) * 8
    grad_fg, grad_bg = (torch.zeros_like(either) if grad is None else grad for grad in (grad_fg, grad_bg))
    need_x, need_attention = ctx.needs_input_grad[:2]
    *saved, offsets = ctx.saved_tensors
    grad_x, grad_attention = _attention_pool_backward(
        *saved,
        grad_fg,
        grad_bg,
        ctx.threshold,
        ctx.background_threshold,
        ctx.mean,
        need_x,
        need_attention,
        offsets,
        ctx.t,
    )
    return grad_x if need_x else None, grad_attention if need_attention else None, *(None,) * 6


def _check_backward(
    x: Tensor,
    attention: Tensor,
    lengths: Tensor | None,
    fg: Tensor | None,
    bg: Tensor | None,
    grad_fg: Tensor,
    grad_bg: Tensor,
    threshold: float,
    background_threshold: float,
    mean: bool,
    need_x: bool,
    need_attention: bool,
    offsets: Tensor | None,
    t: int,
) -> None:
    where = "attention_pool_backward"
    _check(x, attention, lengths, threshold, background_threshold, mean, offsets, t, where)
    b, _, d = padded_shape(x, offsets, t)
    like = (b, d), attention.dtype, x.device
    check_like(where, "grad_fg", grad_fg, *like)
    check_like(where, "grad_bg", grad_bg, *like)
    if mean:
        check_like(where, "fg", fg, *like)
        check_like(where, "bg", bg, *like)


def _gradient(
    native: Native,
    x: Tensor,
    attention: Tensor,
    lengths: Tensor | None,
    fg: Tensor | None,
    bg: Tensor | None,
    grad_fg: Tensor,
    grad_bg: Tensor,
    threshold: float,
    background_threshold: float,
    mean: bool,
    need_x: bool,
    need_attention: bool,
    offsets: Tensor | None,
    t: int,
) -> tuple[Tensor, Tensor]:
    grad_x = blank_like(x, offsets) if need_x else x.new_empty(0)
    grad_attention = blank_like(attention, offsets) if need_attention else attention.new_empty(0)
    b, t, d = padded_shape(x, offsets, t)
    terms = attention.new_empty(b, 2, 2) if mean and native is _native.on_cuda else None
    none = None
    settings = threshold, background_threshold, mean
    saved = x, attention, lengths, b, t, d, fg, bg, none, none, none, none
    gradients = grad_fg, grad_bg, grad_x if need_x else none, grad_attention if need_attention else none, terms
    native("attention_pool_backward", x, (*settings, *saved, *gradients, offsets, x.shape[0]))
    return grad_x, grad_attention


def _gradient_fake(x, attention, *rest) -> tuple[Tensor, Tensor]:
    need_x, need_attention = rest[-4:-2]
    return x.new_empty(x.shape if need_x else 0), attention.new_empty(attention.shape if need_attention else 0)


_SETTINGS = "float threshold, float background_threshold, bool mean"
_attention_pool = _library.register(
    f"attention_pool(Tensor x, Tensor attention, Tensor? lengths, {_SETTINGS}, Tensor? offsets, SymInt max_length)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    check=_check,
    kernel=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_attention_pool_backward = _library.register(
    "attention_pool_backward(Tensor x, Tensor attention, Tensor? lengths, Tensor? fg, Tensor? bg, Tensor grad_fg, "
    f"Tensor grad_bg, {_SETTINGS}, bool need_x, bool need_attention, Tensor? offsets, SymInt max_length)"
    " -> (Tensor, Tensor)",
    check=_check_backward,
    kernel=_gradient,
    fake=_gradient_fake,
    backward=_library.refuse_double_backward,
)
