"""The activation between temporal convolutions, which see zeros past a recording's length."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from d2net.errors import InputError
from d2net.ops import _library
from d2net.ops._native import Native
from d2net.ops.checks import (
    as_number,
    as_tensor,
    as_whole,
    check_floating,
    check_lengths,
    check_like,
    check_shape,
    within,
)


def masked_leaky_relu(x: Tensor, lengths: Tensor | None = None, *, slope: float = 0.2, time_dim: int = 1) -> Tensor:
    """``F.leaky_relu(x, slope)`` within the length of every recording and 0 past it, in one pass.

    Args:
        x: (B, T, D), or (B, D, T) as ``nn.Conv1d`` gives it.
        lengths: (B,) int64 snippets of each recording, or None (all T).
        slope: factor of numbers that are not above 0, at least 0.
        time_dim: the dimension of x that is T, 1 or 2.

    Returns:
        The shape and type of x. NaN within a length propagates. Twice differentiable.

    Raises:
        InputError: wrong shape, dtype or device, a slope below 0 or not finite, or a time_dim other than 1 or 2.
    """
    x, slope = as_tensor("masked_leaky_relu", "x", x), as_number("masked_leaky_relu", "slope", slope)
    time_dim = as_whole("masked_leaky_relu", "time_dim", time_dim)
    lengths = None if lengths is None else as_tensor("masked_leaky_relu", "lengths", lengths, x)
    if _library.has_kernel("masked_leaky_relu", x):
        return _masked_leaky_relu(x, lengths, slope, time_dim)
    _check(x, lengths, slope, time_dim)
    return masked_leaky_relu_ref(x, lengths, slope=slope, time_dim=time_dim)


def masked_leaky_relu_ref(x: Tensor, lengths: Tensor | None = None, *, slope: float = 0.2, time_dim: int = 1) -> Tensor:
    """:func:`masked_leaky_relu` in plain PyTorch, on any device, without checks."""
    past = ~within(x.transpose(1, time_dim), lengths)
    return F.leaky_relu(x.masked_fill(past.unsqueeze(3 - time_dim), 0), slope)


def _check(x: Tensor, lengths: Tensor | None, slope: float, time_dim: int, operator: str = "masked_leaky_relu") -> None:
    check_shape(operator, "x", x, "B, T, D" if time_dim == 1 else "B, D, T")
    check_floating(operator, "x", x)
    if not 0 <= slope < float("inf"):
        raise InputError(f"{operator}: slope is {slope}, expected a finite number of at least 0")
    if time_dim not in (1, 2):
        raise InputError(f"{operator}: time_dim is {time_dim}, expected 1 for (B, T, D) or 2 for (B, D, T)")
    check_lengths(operator, lengths, x)


def _fake(x: Tensor, lengths: Tensor | None, slope: float, time_dim: int) -> Tensor:
    return x.new_empty(x.shape)


def _sizes(x: Tensor, time_dim: int) -> tuple[int, int, int, bool]:
    return len(x), x.shape[time_dim], x.shape[3 - time_dim], time_dim == 2


def _forward(native: Native, x: Tensor, lengths: Tensor | None, slope: float, time_dim: int) -> Tensor:
    y = _fake(x, lengths, slope, time_dim)
    native("masked_leaky_relu", x, (slope, *_sizes(x, time_dim), lengths, x, y, None, None))
    return y


def _setup_context(ctx, inputs, output) -> None:
    _, lengths, ctx.slope, ctx.time_dim = inputs
    ctx.save_for_backward(output, lengths)  # its sign is that of x, which may go


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _masked_leaky_relu_backward(grad, *ctx.saved_tensors, ctx.slope, ctx.time_dim), None, None, None


def _check_backward(grad: Tensor, y: Tensor, lengths: Tensor | None, slope: float, time_dim: int) -> None:
    _check(y, lengths, slope, time_dim, "masked_leaky_relu_backward")
    check_like("masked_leaky_relu_backward", "grad", grad, y.shape, y.dtype, y.device)


def _gradient(native: Native, grad: Tensor, y: Tensor, lengths: Tensor | None, slope: float, time_dim: int) -> Tensor:
    grad_x = torch.empty_like(y)
    members = slope, *_sizes(y, time_dim), lengths, None, y, grad, grad_x
    native("masked_leaky_relu_backward", y, members)
    return grad_x


def _gradient_fake(grad: Tensor, y: Tensor, lengths: Tensor | None, slope: float, time_dim: int) -> Tensor:
    return y.new_empty(y.shape)


def _gradient_setup_context(ctx, inputs, output) -> None:
    _, y, lengths, ctx.slope, ctx.time_dim = inputs
    ctx.save_for_backward(y, lengths)


def _gradient_backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    # The gradient is linear in grad, and does not change with y.
    return _masked_leaky_relu_backward(grad, *ctx.saved_tensors, ctx.slope, ctx.time_dim), None, None, None, None


_masked_leaky_relu = _library.register(
    "masked_leaky_relu(Tensor x, Tensor? lengths, float slope, int time_dim) -> Tensor",
    check=_check,
    kernel=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_masked_leaky_relu_backward = _library.register(
    "masked_leaky_relu_backward(Tensor grad, Tensor y, Tensor? lengths, float slope, int time_dim) -> Tensor",
    check=_check_backward,
    kernel=_gradient,
    fake=_gradient_fake,
    setup_context=_gradient_setup_context,
    backward=_gradient_backward,
)
