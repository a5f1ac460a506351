"""Pairwise temporal intersection over union."""

from __future__ import annotations

import torch
from torch import Tensor

from d2net.errors import InputError
from d2net.ops import _library, _native


def iou_1d(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every segment of ``a`` with every segment of ``b``.

    Args:
        a: (N, 2) start and end, in any unit of time shared with ``b``.
        b: (M, 2).

    Returns:
        (N, M) values in [0, 1]: 0 where the union is empty. A segment that ends before it starts counts as
        empty; NaN propagates. Integers are computed in float64, half precision in float32. Differentiable.

    Raises:
        InputError: an argument that is not (N, 2), or arguments on two devices.
    """
    for name, x in (("a", a), ("b", b)):
        if x.ndim != 2 or x.shape[1] != 2:
            raise InputError(f"iou_1d: {name} has shape {tuple(x.shape)}, expected (N, 2) with start and end of each")
    if a.device != b.device:
        raise InputError(f"iou_1d: a is on {a.device} but b on {b.device}; move one of them")
    dtype = torch.promote_types(a.dtype, b.dtype)
    dtype = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.float64
    a, b = a.to(dtype), b.to(dtype)
    if _library.has_kernel("iou_1d", a):
        return _iou_1d(a, b)
    return iou_1d_reference(a, b)


def iou_1d_reference(a: Tensor, b: Tensor) -> Tensor:
    """:func:`iou_1d` in plain PyTorch, on any device, without checks."""
    a, b = a[:, None], b[None]
    overlap = (torch.minimum(a[..., 1], b[..., 1]) - torch.maximum(a[..., 0], b[..., 0])).clamp(min=0)
    union = (a[..., 1] - a[..., 0]).clamp(min=0) + (b[..., 1] - b[..., 0]).clamp(min=0) - overlap
    return overlap / torch.where(union == 0, 1, union)  # not 0/0, whose gradient is NaN


def _cpu(a: Tensor, b: Tensor) -> Tensor:
    out = a.new_empty(len(a), len(b))
    _native.cpu("iou_1d", a.dtype, a.contiguous(), len(a), b.contiguous(), len(b), out)
    return out


def _cuda(a: Tensor, b: Tensor) -> Tensor:
    out = a.new_empty(len(a), len(b))
    _native.cuda("iou_1d", a.dtype, a.device, a.contiguous(), len(a), b.contiguous(), len(b), out)
    return out


def _fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0])


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
    a, b = ctx.saved_tensors
    # The gradient is needed by regression losses, which compare few pairs: autograd through the reference will do.
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (a, b)]
        return torch.autograd.grad(iou_1d_reference(*leaves), leaves, grad)


_iou_1d = _library.register(
    "iou_1d(Tensor a, Tensor b) -> Tensor",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
