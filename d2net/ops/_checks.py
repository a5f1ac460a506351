"""Argument checks that every operator shares. Nothing here waits for a device."""

from __future__ import annotations

import torch
from torch import Tensor

from d2net.errors import InputError


def check_shape(operator: str, name: str, x: Tensor, dims: str) -> None:
    """Require as many dimensions as ``dims`` names, such as "B, T, C"."""
    if x.ndim != dims.count(",") + 1:
        raise InputError(f"{operator}: {name} has shape {tuple(x.shape)}, expected ({dims})")


FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_floating(operator: str, name: str, x: Tensor) -> None:
    if x.dtype not in FLOATING:
        raise InputError(
            f"{operator}: {name} has dtype {x.dtype}, expected floating point of 16, 32 or 64 bits; use {name}.float()"
        )


def check_same(operator: str, name: str, x: Tensor, other: str, y: Tensor, dims: int | None = None) -> None:
    """Require the same device and the same first ``dims`` sizes (all when None)."""
    if x.device != y.device:
        raise InputError(f"{operator}: {name} is on {x.device} but {other} on {y.device}; move one of them")
    if x.shape[:dims] != y.shape[:dims]:
        raise InputError(f"{operator}: {name} has shape {tuple(x.shape)} but {other} {tuple(y.shape)}; they must match")


def check_lengths(operator: str, x: Tensor, lengths: Tensor | None) -> None:
    """Require None or integers (B,) on the device of ``x`` (B, T, ...)."""
    if lengths is None:
        return
    b = x.shape[0]
    if lengths.shape != (b,) or lengths.is_floating_point():
        raise InputError(
            f"{operator}: lengths has shape {tuple(lengths.shape)} and dtype {lengths.dtype}, expected ({b},) int64"
        )
    if lengths.device != x.device:
        raise InputError(f"{operator}: lengths is on {lengths.device} but the input on {x.device}; move one of them")


def valid_mask(operator: str, x: Tensor, lengths: Tensor | None) -> Tensor:
    """(B, T) bool: True where snippet t lies before the recording's length. ``x`` is (B, T, ...)."""
    check_lengths(operator, x, lengths)
    return within(x, lengths)


def within(x: Tensor, lengths: Tensor | None) -> Tensor:
    """:func:`valid_mask` without its checks."""
    b, t = x.shape[:2]
    if lengths is None:
        return torch.ones(b, t, dtype=torch.bool, device=x.device)
    return torch.arange(t, device=x.device) < lengths[:, None]
