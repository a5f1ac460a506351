"""Checks that the loss terms have in common. Nothing here waits for a device."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from d2net.errors import InputError
from d2net.fields import checked
from d2net.ops.checks import (
    as_lengths,
    as_tensors,
    can_look_at,
    check_activations,
    check_same,
    check_shape,
    may_be_activations,
)
from d2net.ops.packed import as_offsets, packed_extents, padded
from d2net.ops.precision import at_least_float32

Normalization = Literal["joint", "per_class"]


def setting(loss: nn.Module, wanted: Any, **named: object) -> Any:
    """The setting given by keyword, checked and converted like a field of a recipe (:mod:`d2net.fields`).

    Args:
        loss: The loss that has the setting, for the message.
        wanted: Its type.
        named: The setting: one keyword argument.

    Raises:
        InputError: a value of another type or out of range.
    """
    ((name, value),) = named.items()
    return checked(value, wanted, f"{type(loss).__name__}: {name}")


class Rows(NamedTuple):
    """Where the recordings of a batch lie: in (B, T, ...), or with ``offsets`` in (N, ...) (:mod:`d2net.ops.packed`).

    Attributes:
        lengths: (B,), or None: as many snippets as there are rows.
        offsets: (B+1,), or None: the batch is padded.
        max_length: With offsets, the most snippets of a recording.
    """

    lengths: Tensor | None
    offsets: Tensor | None = None
    max_length: int | None = None

    @classmethod
    def of(cls, loss: str, x: Tensor, lengths: Tensor | None, offsets: Tensor | None, max_length: int | None) -> Rows:
        """Checked; ``x`` is any tensor of the batch with rows."""
        if offsets is None and max_length is None:
            return cls(as_lengths(loss, lengths, x))
        offsets, most = as_offsets(loss, offsets, max_length, x)
        assert offsets is not None
        if max_length is None and can_look_at(offsets):  # what is padded is then no larger than it must be
            most = max(offsets.diff().tolist(), default=0)
        return cls(as_lengths(loss, lengths, offsets[1:]), offsets, most)

    def padded(self, x: Tensor) -> Tensor:
        """(B, T, ...), for what plain PyTorch computes."""
        if self.offsets is None or self.max_length is None:
            return x
        return padded(x, self.offsets, self.lengths, self.max_length)

    def padded_lengths(self, x: Tensor) -> Tensor | None:
        """The lengths that go with :meth:`padded`; ``x`` is any tensor of the batch with rows."""
        if self.offsets is None or self.max_length is None:
            return self.lengths
        return packed_extents(self.offsets, self.lengths, self.max_length, x.shape[0])[1]

    def count(self, x: Tensor) -> int:
        """B; ``x`` is any tensor of the batch with rows."""
        return (x if self.offsets is None else self.offsets[1:]).shape[0]

    def present(self, x: Tensor) -> Tensor:
        """(B,) bool: whether the recording has a snippet; ``x`` is any tensor of the batch with rows."""
        lengths = self.padded_lengths(x)
        if lengths is None:
            return torch.full(x.shape[:1], x.shape[1] > 0, dtype=torch.bool, device=x.device)
        return lengths > 0


def take_scores(
    loss: str,
    tcam: Tensor,
    lengths: Tensor | None,
    labels: Tensor,
    offsets: Tensor | None = None,
    max_length: int | None = None,
) -> tuple[Tensor, Rows, Tensor]:
    """Class activations, rows and labels of a batch, as tensors and checked; half precision becomes float32."""
    tcam, labels = as_tensors(loss, tcam=tcam, labels=labels)
    check_same_rows(loss, offsets, tcam=(tcam, "C"))
    rows = Rows.of(loss, tcam, lengths, offsets, max_length)
    check_labels(loss, tcam, labels, rows)
    check_scores(loss, tcam, rows)
    check_known(loss, labels, tcam, rows)
    return at_least_float32(tcam), rows, labels


def take_batch(
    loss: str,
    tcam: Tensor,
    embeddings: Tensor,
    lengths: Tensor | None,
    labels: Tensor,
    offsets: Tensor | None = None,
    max_length: int | None = None,
) -> tuple[Tensor, Tensor, Rows, Tensor]:
    """Class activations, embeddings, rows and labels of a batch, as tensors and checked.

    Activations in half precision become float32, so that their gradient is summed in float32 and rounded once.
    Embeddings keep their dtype: the operators that read them sum in float32.
    """
    tcam, embeddings, labels = as_tensors(loss, tcam=tcam, embeddings=embeddings, labels=labels)
    check_same_rows(loss, offsets, tcam=(tcam, "C"), embeddings=(embeddings, "D"))
    rows = Rows.of(loss, tcam, lengths, offsets, max_length)
    check_labels(loss, tcam, labels, rows)
    check_scores(loss, tcam, rows)
    check_known(loss, labels, tcam, rows)
    return at_least_float32(tcam), embeddings, rows, labels


def check_same_rows(loss: str, offsets: Tensor | None, **named: tuple[Tensor, str]) -> None:
    """Require the same rows of every tensor: (B, T) or, with offsets, (N,), and the dimension that is given with it."""
    (name, (first, _)), *_ = named.items()
    for other, (x, width) in named.items():
        dims = "B, T" if offsets is None else "N"
        check_shape(loss, other, x, f"{dims}, {width}" if width else dims)
        if x is not first:
            check_same(loss, name, first, other, x, 2 if offsets is None else 1)


def check_labels(loss: str, tcam: Tensor, labels: Tensor, rows: Rows) -> None:
    b = rows.count(tcam)
    if labels.shape != (b, tcam.shape[-1]) or labels.device != tcam.device:
        raise InputError(
            f"{loss}: labels have shape {tuple(labels.shape)} on {labels.device}, expected multi-hot "
            f"({b}, {tcam.shape[-1]}) on {tcam.device}"
        )


def check_scores(loss: str, tcam: Tensor, rows: Rows) -> None:
    """Require activations in [0, 1] within the recordings, where they can be read at little cost."""
    if rows.offsets is None or not may_be_activations(tcam):
        check_activations(loss, "tcam", rows.padded(tcam), rows.padded_lengths(tcam))


def check_known(loss: str, labels: Tensor, tcam: Tensor, rows: Rows) -> None:
    """Refuse NaN in the labels of recordings that have a snippet, where the labels can be read at little cost.

    The losses ask whether a label is above 0, which is false for NaN: it would count as the absence of the class.
    """
    if not labels.is_floating_point() or not can_look_at(labels):
        return
    if math.isnan(labels.sum().item()) and (rows.lengths is None or can_look_at(rows.lengths)):  # or Inf - Inf
        unknown = labels.isnan().any(1) & rows.present(tcam)
        if unknown.any():
            raise InputError(
                f"{loss}: labels are NaN in {int(unknown.sum())} of {len(labels)} recordings (first in recording "
                f"{int(unknown.nonzero()[0])}), expected above 0 where a recording has the class and else 0"
            )
