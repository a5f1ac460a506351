"""Puts gap rows between the recordings of a batch, for the convolutions, and takes them out again.

A gap as wide as a kernel reaches comes before the first recording and after every one, so that packed rows can be
convolved as one recording.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from d2net.ops.checks import as_lengths, as_tensor, check_lengths, within
from d2net.ops.packed import as_offsets, packed_extents


class Layout(Protocol):
    """What decides the rows: a :class:`d2net.model.D2Net`."""

    @property
    def reach(self) -> int: ...

    def rows(self, least: int) -> int: ...


class Padded:
    """Of a batch (B, T, width).

    Attributes:
        mask: (N,) bool, whether a row belongs to a recording.
    """

    def __init__(self, features: Tensor, lengths: Tensor | None, layout: Layout) -> None:
        self.b, self.t = features.shape[:2]
        self.reach = layout.reach
        self.n = layout.rows(self.reach + max(self.reach, self.b * (self.t + self.reach)))
        self.inside = within(features, as_lengths("D2Net", lengths, features))
        self.mask = self.insert(self.inside)

    def insert(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (N, ...), 0 in gaps, which past a length is."""
        rows = x.new_zeros(self.n, *x.shape[2:])
        kept = x if x is self.inside else x.masked_fill(~self.inside[:, :, None], 0)
        self._view(rows)[:, : self.t] = kept
        return rows

    def remove(self, rows: Tensor) -> Tensor:
        """(N, ...) -> (B, T, ...)."""
        return self._view(rows)[:, : self.t].contiguous()

    def _view(self, rows: Tensor) -> Tensor:
        span = self.t + self.reach
        return rows[self.reach : self.reach + self.b * span].view(self.b, span, *rows.shape[1:])


class Packed:
    """Of recordings one after another, (N, width), with any gaps or none.

    Attributes:
        mask: As of :class:`Padded`.
    """

    def __init__(self, features: Tensor, lengths: Tensor | None, offsets: Tensor, layout: Layout) -> None:
        checked, n = as_offsets("D2Net", offsets, None, features)
        assert checked is not None
        if lengths is not None:
            lengths = as_tensor("D2Net", "lengths", lengths, features)
            check_lengths("D2Net", lengths, checked[:-1])
        begins, lengths = packed_extents(checked, lengths, n, n)
        b, reach, device = begins.shape[0], layout.reach, features.device
        shifts = reach * torch.arange(1, b + 1, device=device)
        rows = torch.arange(layout.rows(n + (max(b, 1) + 1) * reach), device=device)
        self.mask, recording, at = _place(rows, begins + shifts, lengths)
        self.source = torch.where(self.mask, at + begins[recording], 0) if b else torch.zeros_like(rows)
        inside, recording, at = _place(torch.arange(n, device=device), begins, lengths)
        self.inside = inside[:, None]
        self.target = torch.where(inside, at + (begins + shifts)[recording], 0) if b else torch.zeros_like(at)

    def insert(self, x: Tensor) -> Tensor:
        """(N, ...) -> with gaps, which are 0."""
        if x.shape[0] == 0:
            return x.new_zeros(self.mask.shape[0], *x.shape[1:])
        return torch.where(self.mask[:, None], x[self.source], 0)

    def remove(self, rows: Tensor) -> Tensor:
        """With gaps -> (N, ...)."""
        return torch.where(self.inside, rows[self.target], 0)


def _place(rows: Tensor, begins: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of every row: whether it belongs to a recording, to which, and the place in it."""
    if begins.shape[0] == 0:
        return torch.zeros_like(rows, dtype=torch.bool), rows, rows
    recording = torch.searchsorted(begins, rows, right=True) - 1
    inside = recording >= 0
    recording = recording.clamp(min=0)
    at = rows - begins[recording]
    return inside & (at < lengths[recording]), recording, at
