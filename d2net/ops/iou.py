"""Pairwise temporal intersection over union."""

from __future__ import annotations

import torch
from torch import Tensor

from d2net.errors import InputError
from d2net.ops import _library
from d2net.ops._native import Native
from d2net.ops.checks import as_tensors, check_computed, check_floating, check_like


def iou_1d(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every segment of ``a`` with every segment of ``b``.

    Args:
        a: (N, 2) start and end, in the same unit of time as ``b``.
        b: (M, 2) start and end.

    Returns:
        (N, M) values in [0, 1]; iou_1d(a, b) and iou_1d(b, a) have the same bits. 0 where the union is empty and where
        the lengths add up to infinity. A segment that ends before it starts counts as empty; NaN propagates. Integers
        are computed in float64, half precision in float32. Differentiable once; the gradient is 0 in the cases of value
        0 above, and where the union is below the smallest normal number of the dtype, whose reciprocal overflows.

    Raises:
        InputError: an argument that is not (N, 2) or is of 8-bit floats, or arguments on two devices.
    """
    a, b = as_tensors("iou_1d", a=a, b=b)
    for name, x in (("a", a), ("b", b)):
        if x.is_floating_point():
            check_floating("iou_1d", name, x)
    dtype = torch.promote_types(a.dtype, b.dtype)
    dtype = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.float64
    a, b = a.to(dtype), b.to(dtype)
    if _library.has_kernel("iou_1d", a):
        return _iou_1d(a, b)
    _check(a, b)
    return iou_1d_ref(a, b)


def iou_1d_ref(a: Tensor, b: Tensor) -> Tensor:
    """:func:`iou_1d` in plain PyTorch, on any device, without checks."""
    _, overlap, union, tiny = _compared(a, b)
    iou = overlap / torch.where(tiny, 1, union)
    with torch.no_grad():
        iou_of_tiny = overlap / torch.where(union == 0, 1, union)  # without gradient
    return torch.where(tiny, iou_of_tiny, iou)


def _compared(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(N, M) each: the earlier end minus the later start, the overlap, the union, and whether 1 / union overflows."""
    (start_a, end_a), (start_b, end_b) = a[:, None].unbind(2), b[None].unbind(2)
    # Compared before they are subtracted: inf - inf is NaN.
    lengths = torch.where(end_a <= start_a, 0, end_a - start_a) + torch.where(end_b <= start_b, 0, end_b - start_b)
    meets = torch.minimum(end_a, end_b) - torch.maximum(start_a, start_b)
    overlap = torch.where((lengths == 0) | (lengths == torch.inf), 0, meets.clamp(min=0))
    union = lengths - overlap
    return meets, overlap, union, union < torch.finfo(union.dtype).tiny


def _check(a: Tensor, b: Tensor, operator: str = "iou_1d") -> None:
    for name, x in (("a", a), ("b", b)):
        if x.ndim != 2 or x.shape[1] != 2:
            raise InputError(
                f"{operator}: {name} has shape {tuple(x.shape)}, expected (N, 2) with start and end of each"
            )
    check_computed(operator, "a", a)
    if a.device != b.device or a.dtype is not b.dtype:
        raise InputError(
            f"{operator}: a is {a.dtype} on {a.device} but b {b.dtype} on {b.device}; convert or move one of them"
        )


def _forward(native: Native, a: Tensor, b: Tensor) -> Tensor:
    out = _fake(a, b)
    native("iou_1d", a, (a, len(a), b, len(b), out))
    return out


def _fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0])


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _iou_1d_backward(grad, *ctx.saved_tensors)


def _check_backward(grad: Tensor, a: Tensor, b: Tensor) -> None:
    _check(a, b, "iou_1d_backward")
    check_like("iou_1d_backward", "grad", grad, (a.shape[0], b.shape[0]), a.dtype, a.device)


def _gradients(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """In plain PyTorch: regression losses, which need gradients, compare few pairs. Of equal ends each gets half."""
    (start_a, end_a), (start_b, end_b) = a[:, None].unbind(2), b[None].unbind(2)
    meets, overlap, union, tiny = _compared(a, b)
    grad, union = torch.where(tiny, 0, grad), torch.where(tiny, 1, union)
    grad_union = -grad * (overlap / union) / union  # union * union would underflow for unions below 1e-23
    grad_overlap = torch.where(meets >= 0, grad / union - grad_union, 0)
    # 1 where the overlap ends (starts) with a, 0 where with b, 0.5 where with both.
    by_end = (0.5 * ((end_a < end_b) * 1 + (end_a <= end_b) * 1)).to(a.dtype)
    by_start = (0.5 * ((start_a > start_b) * 1 + (start_a >= start_b) * 1)).to(a.dtype)

    def grad_segments(start: Tensor, end: Tensor, dim: int) -> Tensor:
        # An empty segment overlaps nothing, so its grad_union is 0. Both sums in one call: PyTorch splits a sum with a
        # single result by the number of threads, which changes its bits.
        both = torch.stack((-grad_overlap * start - grad_union, grad_overlap * end + grad_union))
        return both.sum(dim).T.contiguous()

    return grad_segments(by_start, by_end, 2), grad_segments(1 - by_start, 1 - by_end, 1)


def _backward_fake(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), b.new_empty(b.shape)


_iou_1d = _library.register(
    "iou_1d(Tensor a, Tensor b) -> Tensor",
    check=_check,
    kernel=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_iou_1d_backward = _library.register(
    "iou_1d_backward(Tensor grad, Tensor a, Tensor b) -> (Tensor, Tensor)",
    check=_check_backward,
    cpu=_gradients,
    cuda=_gradients,
    fake=_backward_fake,
    backward=_library.refuse_double_backward,
)
