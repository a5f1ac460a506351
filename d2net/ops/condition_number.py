"""Logarithm of the condition number of small matrices: pDMI (Eq. 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from d2net.errors import InputError
from d2net.ops._checks import check_floating, check_shape


class _LogConditionNumber(torch.autograd.Function):
    """Autograd through ``svd`` divides by differences of singular values, infinite for repeated ones; only the
    two extreme triplets matter here."""

    @staticmethod
    def forward(ctx, u: Tensor, rank_tol: float) -> Tensor:
        broken = ~torch.isfinite(u).all(2).all(1)  # svd refuses NaN; here it propagates, without a wait
        left, sigma, right = torch.linalg.svd(torch.where(broken[:, None, None], 0, u), full_matrices=False)
        rank = (sigma > rank_tol).sum(1)
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
        ctx.save_for_backward(torch.where(proper[:, None, None], gradient, 0))
        return torch.where(broken, torch.nan, (first_sigma / last_sigma).log())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad[:, None, None], None


def log_condition_number(u: Tensor, *, rank_tol: float = 1e-5) -> Tensor:
    """log(sigma_1 / sigma_r) of every matrix, sigma_r the smallest singular value above ``rank_tol`` (Eq. 7).

    Args:
        u: (N, R, C) matrices, float32 or float64.
        rank_tol: singular values up to this count as zero.

    Returns:
        (N,); 0 for rank <= 1, NaN where ``u`` holds NaN or Inf. The gradient is u1 v1^T / sigma_1 - ur vr^T / sigma_r,
        finite for repeated singular values, and 0 for rank <= 1.

    Raises:
        InputError: wrong shape or dtype.
    """
    check_shape("log_condition_number", "u", u, "N, R, C")
    check_floating("log_condition_number", "u", u)
    if 0 in u.shape:
        return u.sum((1, 2))
    return _LogConditionNumber.apply(u, rank_tol)


def joint_log_condition_number(p: Tensor, y: Tensor, *, rank_tol: float = 1e-5) -> Tensor:
    """:func:`log_condition_number` of the joint distributions U = P Y (Eq. 10).

    Args:
        p: (N, C, n) predictions of n items. y: (N, n, C) labels, already normalised.

    Returns:
        (N,).

    Raises:
        InputError: shapes, dtypes or devices that do not fit.
    """
    check_shape("joint_log_condition_number", "p", p, "N, C, n")
    check_shape("joint_log_condition_number", "y", y, "N, n, C")
    if p.shape[0] != y.shape[0] or p.shape[2] != y.shape[1] or p.device != y.device:
        raise InputError(
            f"joint_log_condition_number: p {tuple(p.shape)} on {p.device} and y {tuple(y.shape)} on {y.device} "
            "cannot be multiplied; expected (N, C, n) and (N, n, C) on one device"
        )
    return log_condition_number(p @ y.to(p.dtype), rank_tol=rank_tol)
