"""Logarithm of the condition number of small matrices: pDMI (Eq. 7)."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from d2net.errors import InputError
from d2net.ops import _library, _native
from d2net.ops._native import Native
from d2net.ops.checks import (
    as_number,
    as_tensor,
    as_tensors,
    check_computed,
    check_floating,
    check_like,
    check_shape,
)
from d2net.ops.precision import at_least_float32, product

MAX_SIZE = 128  # rows or columns of the kernels' largest matrices; PyTorch's SVD does larger ones

Results = TypeVar("Results", bound=tuple[Tensor, ...])

_SMALL = 512  # elements of a matrix that always fits into the shared memory of a CUDA block


def log_condition_number(u: Tensor, *, rank_tol: float = 1e-5) -> Tensor:
    """log(sigma_1 / sigma_r) of every matrix, sigma_r the smallest singular value above ``rank_tol`` (Eq. 7).

    Args:
        u: (N, R, C) matrices. Half precision is converted to float32; but rounding to half precision makes the zero
            singular values of a matrix far larger than 1e-5, so compute ``u`` in float32 where you can. The result is
            float32 also under autocast.
        rank_tol: singular values up to this count as zero.

    Returns:
        (N,); 0 for rank <= 1 and for matrices without elements, NaN where ``u`` holds NaN or Inf. Differentiable once:
        the gradient is u1 v1^T / sigma_1 - ur vr^T / sigma_r. For repeated singular values it is one of the possible
        choices, and finite. It is 0 for rank <= 1, and NaN where the value is NaN.

    Raises:
        InputError: wrong shape or dtype, or a rank_tol that is no number >= 0.
    """
    u = at_least_float32(as_tensor("log_condition_number", "u", u))
    rank_tol = as_number("log_condition_number", "rank_tol", rank_tol)
    if u.ndim == 3 and max(u.shape[1:]) <= MAX_SIZE and _library.has_kernel("log_condition_number", u):
        return _log_condition_number(u, rank_tol)[0]
    _check_matrices(u, rank_tol)
    return log_condition_number_ref(u, rank_tol=rank_tol)


def joint_log_condition_number(p: Tensor, y: Tensor, *, rank_tol: float = 1e-5) -> Tensor:
    """:func:`log_condition_number` of the joint distributions U = P Y (Eq. 10), without forming U where n < C.

    Args:
        p: (N, C, n) predictions of n items.
        y: (N, n, C) labels, already normalised; converted to the dtype of ``p``.
        rank_tol: singular values of U up to this count as zero.

    Returns:
        (N,), as from :func:`log_condition_number`. Differentiable once with respect to both. Where n and C are both
        above 128, and where there is no kernel, U is formed; the result is NaN where U overflows.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, or a rank_tol that is no number >= 0.
    """
    p, y = as_tensors("joint_log_condition_number", p=p, y=y)
    check_floating("joint_log_condition_number", "p", p)
    rank_tol = as_number("joint_log_condition_number", "rank_tol", rank_tol)
    p = at_least_float32(p)
    y = y.to(p.dtype)
    if p.ndim == 3 and min(p.shape[1:]) <= MAX_SIZE and _library.has_kernel("joint_log_condition_number", p):
        return _joint_log_condition_number(p, y, rank_tol)[0]
    _check_factors(p, y, rank_tol)
    return joint_log_condition_number_ref(p, y, rank_tol=rank_tol)


def log_condition_number_ref(u: Tensor, *, rank_tol: float = 1e-5) -> Tensor:
    """:func:`log_condition_number` in plain PyTorch, on any device, without checks."""
    if 0 in u.shape[1:]:
        return u.sum((1, 2))
    if torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        raise RuntimeError(
            "d2net: torch.compile drops the forward-mode derivative of condition numbers; call jvp eagerly"
        )
    return _Reference.apply(u, rank_tol)[0]


def joint_log_condition_number_ref(p: Tensor, y: Tensor, *, rank_tol: float = 1e-5) -> Tensor:
    """:func:`joint_log_condition_number` in plain PyTorch, on any device, without checks."""
    return log_condition_number_ref(product(p, y), rank_tol=rank_tol)


class _Reference(torch.autograd.Function):
    """The value and its gradient, from the first and the last singular triplet alone.

    PyTorch's gradient of ``svd`` divides by differences of singular values, which is infinite for repeated ones.
    """

    @staticmethod
    def forward(u: Tensor, rank_tol: float) -> tuple[Tensor, Tensor]:
        broken = ~torch.isfinite(u).all(2).all(1)  # svd raises for NaN; here NaN propagates, without a wait for a GPU
        u = torch.where(broken[:, None, None], 0, u)
        # Entries near the largest number are scaled down, else sigma_1 would be Inf. Other matrices keep their bits.
        large = u.abs().amax((1, 2)) > torch.finfo(u.dtype).max * 2.0**-40
        scale = torch.where(large, 2.0**-40, 1.0).to(u.dtype)[:, None]
        left, sigma, right = torch.linalg.svd(u * scale[:, :, None], full_matrices=False)
        rank = (sigma > rank_tol * scale).sum(1)
        last = (rank - 1).clamp(min=0)[:, None]
        first_sigma, last_sigma = sigma[:, 0], sigma.gather(1, last)[:, 0]
        proper = rank > 1
        one = torch.ones_like(first_sigma)
        first_sigma, last_sigma = torch.where(proper, first_sigma, one), torch.where(proper, last_sigma, one)
        index = last[:, :, None]
        left_last = left.gather(2, index.expand(-1, left.shape[1], -1))
        right_last = right.gather(1, index.expand(-1, -1, right.shape[2]))
        gradient = left[:, :, :1] @ right[:, :1] / first_sigma[:, None, None]
        gradient = gradient - left_last @ right_last / last_sigma[:, None, None]
        gradient = torch.where(proper[:, None, None], gradient * scale[:, :, None], 0)
        gradient = torch.where(broken[:, None, None], torch.nan, gradient)
        ratio = first_sigma / last_sigma
        value = torch.where(ratio == torch.inf, first_sigma.log() - last_sigma.log(), ratio.log())
        return torch.where(broken, torch.nan, value), gradient

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        u, _ = inputs
        _, gradient = output
        ctx.mark_non_differentiable(gradient)
        ctx.save_for_backward(u, gradient)
        ctx.save_for_forward(u, gradient)

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        u, gradient = ctx.saved_tensors
        return _library.differentiable_once(gradient * grad[:, None, None], u), None

    @staticmethod
    def jvp(ctx, tangent: Tensor, _: None) -> tuple[Tensor, None]:
        u, gradient = ctx.saved_tensors
        return (_library.differentiable_once(gradient, u) * tangent).sum((1, 2)), None

    @staticmethod
    def vmap(info, in_dims, u: Tensor, rank_tol: float) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        u = u.movedim(in_dims[0], 0)
        value, gradient = _Reference.apply(u.flatten(0, 1), rank_tol)
        return (value.unflatten(0, u.shape[:2]), gradient.unflatten(0, u.shape[:2])), (0, 0)


def check_rank_tol(operator: str, rank_tol: float) -> None:
    if not rank_tol >= 0:
        raise InputError(f"{operator}: rank_tol is {rank_tol}, expected at least 0")


def _check_matrices(u: Tensor, rank_tol: float) -> None:
    check_shape("log_condition_number", "u", u, "N, R, C")
    check_computed("log_condition_number", "u", u)
    check_rank_tol("log_condition_number", rank_tol)


def _check_factors(p: Tensor, y: Tensor, rank_tol: float) -> None:
    check_shape("joint_log_condition_number", "p", p, "N, C, n")
    check_shape("joint_log_condition_number", "y", y, "N, n, C")
    check_computed("joint_log_condition_number", "p", p)
    check_rank_tol("joint_log_condition_number", rank_tol)
    if y.shape != (p.shape[0], p.shape[2], p.shape[1]) or p.device != y.device or p.dtype is not y.dtype:
        raise InputError(
            f"joint_log_condition_number: p {tuple(p.shape)} {p.dtype} on {p.device} and y {tuple(y.shape)} {y.dtype} "
            f"on {y.device} cannot be multiplied; expected (N, C, n) and (N, n, C) of one type on one device"
        )


def _check(u: Tensor, rank_tol: float) -> None:
    _check_matrices(u, rank_tol)
    _check_size("log_condition_number", max(u.shape[1:]))


def _joint_check(p: Tensor, y: Tensor, rank_tol: float) -> None:
    _check_factors(p, y, rank_tol)
    _check_size("joint_log_condition_number", min(p.shape[1:]))


def _check_size(operator: str, size: int) -> None:
    if size > MAX_SIZE:
        raise InputError(f"d2net::{operator}: sizes are at most {MAX_SIZE}, found {size}; call d2net.ops.{operator}")


def _forward(native: Native, u: Tensor, rank_tol: float) -> tuple[Tensor, ...]:
    out = _fake(u, rank_tol)
    if u.numel() == 0:
        return _zeros(out)
    scratch = _scratch(native, "log_condition_number", u)
    native("log_condition_number", u, (rank_tol, u, *u.shape, *out, scratch, None, None))
    return out


def _zeros(out: Results) -> Results:
    """The results for matrices without elements: all 0."""
    for x in out:
        x.zero_()
    return out


def _scratch(native: Native, function: str, x: Tensor) -> Tensor | None:
    """Memory for matrices that do not fit into the shared memory of a CUDA block; None where they do, and on a CPU."""
    if native is _native.on_cpu or x.shape[1] * x.shape[2] <= _SMALL:
        return None
    size = native(f"{function}_scratch", x, *x.shape)
    return x.new_empty(size, dtype=torch.float64) if size > 0 else None


def _fake(u: Tensor, rank_tol: float) -> tuple[Tensor, Tensor, Tensor]:
    n, rows, cols = u.shape
    return u.new_empty(n), u.new_empty(n, 2, rows), u.new_empty(n, 2, cols)


def _setup_context(ctx, inputs, output) -> None:
    """For both operators: saves the factors of the gradient, and the inputs, for ``differentiable_once``."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *inputs[:-1])


def _backward(ctx, grad: Tensor | None, *_: None) -> tuple[Tensor | None, None]:
    if grad is None:
        return None, None
    left, right, u = ctx.saved_tensors
    return _library.differentiable_once(_log_condition_number_backward(grad, left, right), u), None


def _check_backward(grad: Tensor, left: Tensor, right: Tensor) -> None:
    where = "log_condition_number_backward"
    for name, x in (("left", left), ("right", right)):
        if x.ndim != 3 or x.shape[1] != 2:
            raise InputError(f"{where}: {name} has shape {tuple(x.shape)}, expected (N, 2, size)")
    check_computed(where, "left", left)
    n, dtype, device = left.shape[0], left.dtype, left.device
    check_like(where, "right", right, (n, 2, right.shape[2]), dtype, device)
    check_like(where, "grad", grad, (n,), dtype, device)


def _gradient(native: Native, grad: Tensor, left: Tensor, right: Tensor) -> Tensor:
    grad_u, none = _gradient_fake(grad, left, right), None
    if grad_u.numel() > 0:
        members = 0.0, none, *grad_u.shape, none, left, right, none, grad, grad_u
        native("log_condition_number_backward", left, members)
    return grad_u


def _gradient_fake(grad: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[0], left.shape[2], right.shape[2])


def _joint_forward(native: Native, p: Tensor, y: Tensor, rank_tol: float) -> tuple[Tensor, ...]:
    out = _joint_fake(p, y, rank_tol)
    if p.numel() == 0:
        return _zeros(out)
    scratch = _scratch(native, "joint_log_condition_number", p)
    native("joint_log_condition_number", p, (rank_tol, p, y, *p.shape, *out, scratch))
    return out


def _joint_fake(p: Tensor, y: Tensor, rank_tol: float) -> tuple[Tensor, ...]:
    n, classes, items = p.shape
    return p.new_empty(n), *(p.new_empty(n, 2, size) for size in (classes, items, items, classes))


def _joint_backward(ctx, grad: Tensor | None, *_: None) -> tuple[Tensor | None, Tensor | None, None]:
    if grad is None:
        return None, None, None
    p_left, p_right, y_left, y_right, *inputs = ctx.saved_tensors

    def gradient(left: Tensor, right: Tensor) -> Tensor:
        return _library.differentiable_once(_log_condition_number_backward(grad, left, right), *inputs)

    need_p, need_y = ctx.needs_input_grad[:2]
    return gradient(p_left, p_right) if need_p else None, gradient(y_left, y_right) if need_y else None, None


# `left` (N, 2, R) and `right` (N, 2, C) are factors of the gradient left^T right, which has rank two: they take less
# memory than the gradient.
_log_condition_number = _library.register(
    "log_condition_number(Tensor u, float rank_tol) -> (Tensor value, Tensor left, Tensor right)",
    check=_check,
    kernel=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=torch.float32,
)
_joint_log_condition_number = _library.register(
    "joint_log_condition_number(Tensor p, Tensor y, float rank_tol)"
    " -> (Tensor value, Tensor p_left, Tensor p_right, Tensor y_left, Tensor y_right)",
    check=_joint_check,
    kernel=_joint_forward,
    fake=_joint_fake,
    setup_context=_setup_context,
    backward=_joint_backward,
    autocast=torch.float32,
)
_log_condition_number_backward = _library.register(
    "log_condition_number_backward(Tensor grad, Tensor left, Tensor right) -> Tensor",
    check=_check_backward,
    kernel=_gradient,
    fake=_gradient_fake,
    backward=_library.refuse_double_backward,
)
