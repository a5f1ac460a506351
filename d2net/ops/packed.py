"""Packed batches: the rows of all recordings one after another in (N, ...), instead of (B, T, ...) with padding.

Recording b has the rows from ``offsets[b]`` on, as many as its length: ``lengths[b]``, at most
``offsets[b + 1] - offsets[b]`` and at most ``max_length``. All other rows are gap rows. What they hold never matters,
and results and gradients are 0 there. A padded batch is the case ``offsets[b] = b T``.

Nothing here waits for a device, and no shape depends on the values of a tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from d2net.errors import InputError
from d2net.ops.checks import INTEGERS, as_tensor, as_whole, can_look_at, check_shape

__all__ = ["packed", "padded"]


def as_offsets(operator: str, offsets: Any, max_length: Any, x: Tensor) -> tuple[Tensor | None, int]:
    """``offsets`` as a tensor on the device of ``x``, checked, and the most rows that a recording may have.

    Args:
        operator: whose arguments these are, for messages.
        offsets: (B+1,) integers of at least 0 that never fall, at most N; None for a padded batch.
        max_length: an upper bound of the lengths, or None.
        x: (N, ...), or (B, T, ...) without offsets.

    Returns:
        (offsets, the smaller of ``max_length`` and N), or (None, 0) for a padded batch.

    Raises:
        InputError: offsets of a wrong shape, dtype or device, or values that are not as above, where they can be read
            at little cost (:func:`can_look_at`; kernels clamp them otherwise); max_length negative, no whole number, or
            without offsets.
    """
    if offsets is None:
        if max_length is not None:
            raise InputError(f"{operator}: max_length is given without offsets; it is for packed batches, leave it out")
        return None, 0
    offsets = as_tensor(operator, "offsets", offsets, x)
    check_offsets(operator, offsets, x, 0)
    n = x.shape[0]
    if can_look_at(offsets):
        _check_values(operator, offsets.tolist(), n)
    if max_length is None:
        return offsets, n
    max_length = as_whole(operator, "max_length", max_length)
    if max_length < 0:
        raise InputError(f"{operator}: max_length is {max_length}, expected 0 or more")
    return offsets, min(max_length, n)


def check_offsets(operator: str, offsets: Tensor | None, x: Tensor, max_length: int) -> None:
    """Require None, or integers (B+1,) on the device of ``x`` (N, ...) and a ``max_length`` of at most N.

    Any values of offsets: operators clamp them.
    """
    if offsets is None:
        return
    if offsets.ndim != 1 or offsets.shape[0] == 0 or offsets.dtype not in INTEGERS:
        raise InputError(
            f"{operator}: offsets has shape {tuple(offsets.shape)} and dtype {offsets.dtype}, expected (B+1,) int64"
        )
    if offsets.device != x.device:
        raise InputError(f"{operator}: offsets is on {offsets.device} but the input on {x.device}; move one of them")
    if x.ndim == 0:
        raise InputError(f"{operator}: the input is a single number, expected rows (N, ...) with offsets")
    if not 0 <= max_length <= x.shape[0]:
        raise InputError(f"{operator}: max_length is {max_length}, expected 0 to {x.shape[0]}, the rows of the input")


def check_rows(operator: str, name: str, x: Tensor, dims: str, offsets: Tensor | None, max_length: int) -> None:
    """Require the dimensions ``dims``, such as "B, T, C"; with offsets "N, C", and offsets that fit."""
    if offsets is not None:
        check_offsets(operator, offsets, x, max_length)
        dims = dims.replace("B, T", "N")
    check_shape(operator, name, x, dims)


def padded_shape(x: Tensor, offsets: Tensor | None, max_length: int) -> tuple[int, ...]:
    """(B, T, ...) of a batch, padded or not."""
    return x.shape if offsets is None else (offsets.shape[0] - 1, max_length, *x.shape[1:])


def blank_like(x: Tensor, offsets: Tensor | None) -> Tensor:
    """Memory for a kernel's result: uninitialised or, in a packed batch, of whose rows not all are written, zeros."""
    return torch.empty_like(x) if offsets is None else torch.zeros_like(x)


def _check_values(operator: str, offsets: list[int], n: int) -> None:
    if offsets[0] < 0:
        raise InputError(f"{operator}: offsets[0] is {offsets[0]}, expected 0 or more")
    for b, (first, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        if end < first:
            raise InputError(f"{operator}: offsets[{b + 1}] is {end}, below offsets[{b}], {first}; they must not fall")
    if offsets[-1] > n:
        raise InputError(f"{operator}: offsets[{len(offsets) - 1}] is {offsets[-1]}, past the {n} rows of the input")


def packed_extents(offsets: Tensor, lengths: Tensor | None, max_length: int, n: int) -> tuple[Tensor, Tensor]:
    """(B,) int64 each: the first row and the length of every recording, within ``n`` rows whatever the values."""
    offsets = offsets.long().clamp(0, n)
    first = offsets[:-1]
    length = offsets[1:] - first
    if lengths is not None:
        length = torch.minimum(length, lengths.long())
    return first, length.clamp(0, max_length)


def padded(x: Tensor, offsets: Tensor, lengths: Tensor | None, max_length: int) -> Tensor:
    """(B, ``max_length``, ...): the recordings of ``x`` (N, ...), 0 past their lengths. Differentiable.

    Args:
        x: (N, ...) packed rows.
        offsets: (B+1,) integers.
        lengths: (B,) integers, or None: up to the next recording.
        max_length: T of the result; longer recordings are cut.
    """
    n = x.shape[0]
    first, length = packed_extents(offsets, lengths, max_length, n)
    step = torch.arange(max_length, device=x.device)
    rows = torch.where(step < length[:, None], first[:, None] + step, n)
    return _rows_or_zero(x, rows.reshape(-1)).reshape(*rows.shape, *x.shape[1:])


def packed(y: Tensor, offsets: Tensor, lengths: Tensor | None, n: int) -> Tensor:
    """(n, ...): the inverse of :func:`padded`, 0 in gap rows. Differentiable.

    Args:
        y: (B, T, ...); what it holds past the lengths is dropped.
        offsets: (B+1,) integers.
        lengths: (B,) integers, or None: up to the next recording.
        n: how many rows the result has.
    """
    b, t = y.shape[:2]
    length = torch.nn.functional.pad(packed_extents(offsets, lengths, t, n)[1], (0, 1))  # 0 behind the last recording
    first = offsets.long().clamp(0, n)
    row = torch.arange(n, device=y.device)
    recording = (torch.searchsorted(first, row, right=True) - 1).clamp(min=0)
    step = row - first[recording]
    rows = torch.where((step >= 0) & (step < length[recording]), recording * t + step, b * t)
    return _rows_or_zero(y.reshape(b * t, *y.shape[2:]), rows)


def as_padded(
    offsets: Tensor | None, lengths: Tensor | None, max_length: int, *rows: Tensor
) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """The lengths and tensors of a padded batch, for a reference: as they are, or :func:`padded`."""
    if offsets is None:
        return lengths, rows
    _, lengths = packed_extents(offsets, lengths, max_length, rows[0].shape[0])
    return lengths, tuple(padded(x, offsets, lengths, max_length) for x in rows)


def _rows_or_zero(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of ``x`` (N, ...) by index; N stands for a row of zeros, so that nothing is read where there is nothing."""
    return torch.cat((x, x.new_zeros(1, *x.shape[1:]))).index_select(0, rows)
