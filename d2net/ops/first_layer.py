"""The products of a stream's first layer as an operator of their own, whose backward is a node of autograd of its own.

The network's backward computes the gradient of the first layers' weights last. As part of the network's node it would
come out together with all others, at the end of the backward. Apart, all others are there before it is computed, and
can be summed over processes meanwhile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2net.errors import InputError
from d2net.ops import _library
from d2net.ops.checks import check_floating, check_like, check_shape
from d2net.ops.network_checks import check_weight
from d2net.ops.precision import without_autocast
from d2net.ops.temporal_conv import convolution, gradient_of_rows, gradient_of_weight, reach_of


def _check(mask: Tensor, x: Tensor, weight: Tensor, copy: Tensor | None, dilation: int) -> None:
    where = "first_layer"
    check_shape(where, "x", x, "N, width")
    check_floating(where, "x", x)
    n, width = x.shape
    check_like(where, "mask", mask, (n,), torch.bool, x.device)
    check_weight(where, "weight", weight, width, x.device)
    if weight.numel() == 0:
        raise InputError(f"{where}: weight is {tuple(weight.shape)}, expected at least 1 everywhere")
    if dilation < 1:
        raise InputError(f"{where}: dilation is {dilation}, expected at least 1")
    reach = reach_of(weight.shape[2:], dilation)
    if n < reach:
        raise InputError(f"{where}: there are {n} rows, expected gaps of {reach} at both ends")
    if copy is not None:
        check_like(where, "copy", copy, (len(weight), weight.shape[2], width), x.dtype, x.device)


def _fake(mask: Tensor, x: Tensor, weight: Tensor, copy: Tensor | None, dilation: int) -> Tensor:
    return x.new_empty(len(x), len(weight))


def _forward(mask: Tensor, x: Tensor, weight: Tensor, copy: Tensor | None, dilation: int) -> Tensor:
    y = convolution(x.contiguous(), _read(weight, copy, x), dilation)
    reach = reach_of(weight.shape[2:], dilation)
    y[:reach], y[len(y) - reach :] = 0, 0  # which the convolution may have left unwritten
    return y


def _read(weight: Tensor, copy: Tensor | None, x: Tensor) -> Tensor:
    """(width out, k, width) as products with ``x`` read it."""
    return weight.permute(0, 2, 1).to(x.dtype).contiguous() if copy is None else copy


def _setup_context(ctx, inputs, output) -> None:
    mask, x, weight, ctx.copy, ctx.dilation = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(mask, x, weight)


def _backward(ctx, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    mask, x, weight = ctx.saved_tensors
    _, need_x, need_weight, *_ = ctx.needs_input_grad
    with without_autocast(x.device.type):
        of_x, of_weight = _first_layer_backward(grad, mask, x, weight, ctx.copy, ctx.dilation, need_x)
    of_weight = of_weight.permute(0, 2, 1)  # it comes in the order of the parameter's memory
    of_x, of_weight = (_library.differentiable_once(y, grad, x, weight) for y in (of_x, of_weight))
    return None, of_x if need_x else None, of_weight if need_weight else None, None, None


def _check_backward(
    grad: Tensor, mask: Tensor, x: Tensor, weight: Tensor, copy: Tensor | None, dilation: int, need_x: bool
) -> None:
    _check(mask, x, weight, copy, dilation)
    check_like("first_layer_backward", "grad", grad, (len(x), len(weight)), x.dtype, x.device)


def _gradient_fake(
    grad: Tensor, mask: Tensor, x: Tensor, weight: Tensor, copy: Tensor | None, dilation: int, need_x: bool
) -> tuple[Tensor, Tensor]:
    out, width, k = weight.shape
    return x.new_empty(x.shape if need_x else (0,)), weight.new_empty(out, k, width)


def _gradient(
    grad: Tensor, mask: Tensor, x: Tensor, weight: Tensor, copy: Tensor | None, dilation: int, need_x: bool
) -> tuple[Tensor, Tensor]:
    grad, x = grad.contiguous(), x.contiguous()
    of_weight = gradient_of_weight(grad, x, weight.shape[2], dilation, weight.dtype)
    if not need_x:
        return x.new_empty(0), of_weight
    of_x = gradient_of_rows(grad, x, _read(weight, copy, x), dilation)
    return torch.where(mask[:, None], of_x, 0), of_weight


# (N, width) rows, 0 where `mask` (N,) is False -> (N, width out), without bias; `weight` is (width out, width, k).
# `copy` is (width out, k, width), of this very weight in the type of `x`, for a GPU. Rows as near to both ends as the
# kernel reaches, which are gaps, are 0. In all gaps the gradient given must be 0; that of `x` is.
first_layer = _library.register(
    "first_layer(Tensor mask, Tensor x, Tensor weight, Tensor? copy, int dilation) -> Tensor",
    check=_check,
    cpu=_forward,
    cuda=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_first_layer_backward = _library.register(
    "first_layer_backward(Tensor grad, Tensor mask, Tensor x, Tensor weight, Tensor? copy, int dilation, bool need_x) "
    "-> (Tensor, Tensor)",
    check=_check_backward,
    cpu=_gradient,
    cuda=_gradient,
    fake=_gradient_fake,
    backward=_library.refuse_double_backward,
)
