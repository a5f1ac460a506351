"""Checks that the loss terms have in common. Nothing here waits for a device."""

from __future__ import annotations

import math
from typing import Any, Literal

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
)
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


def take_scores(
    loss: str, tcam: Tensor, lengths: Tensor | None, labels: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Class activations, lengths and labels of a batch, as tensors and checked; half precision becomes float32."""
    tcam, labels = as_tensors(loss, tcam=tcam, labels=labels)
    check_labels(loss, tcam, labels)
    lengths = as_lengths(loss, lengths, tcam)
    check_activations(loss, "tcam", tcam, lengths)
    check_known(loss, labels, tcam, lengths)
    return at_least_float32(tcam), lengths, labels


def take_batch(
    loss: str, tcam: Tensor, embeddings: Tensor, lengths: Tensor | None, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Class activations, embeddings, lengths and labels of a batch, as tensors and checked.

    Activations in half precision become float32, so that their gradient is summed in float32 and rounded once.
    Embeddings keep their dtype: the operators that read them sum in float32.
    """
    tcam, embeddings, labels = as_tensors(loss, tcam=tcam, embeddings=embeddings, labels=labels)
    check_batch(loss, tcam, embeddings, labels)
    lengths = as_lengths(loss, lengths, tcam)
    check_activations(loss, "tcam", tcam, lengths)
    check_known(loss, labels, tcam, lengths)
    return at_least_float32(tcam), embeddings, lengths, labels


def check_labels(loss: str, tcam: Tensor, labels: Tensor) -> None:
    check_shape(loss, "tcam", tcam, "B, T, C")
    if labels.shape != (tcam.shape[0], tcam.shape[2]) or labels.device != tcam.device:
        raise InputError(
            f"{loss}: labels have shape {tuple(labels.shape)} on {labels.device}, expected multi-hot "
            f"({tcam.shape[0]}, {tcam.shape[2]}) on {tcam.device}"
        )


def check_known(loss: str, labels: Tensor, tcam: Tensor, lengths: Tensor | None) -> None:
    """Refuse NaN in the labels of recordings that have a snippet, where the labels can be read at little cost.

    The losses ask whether a label is above 0, which is false for NaN: it would count as the absence of the class.
    """
    if not labels.is_floating_point() or not can_look_at(labels):
        return
    if math.isnan(labels.sum().item()) and (lengths is None or can_look_at(lengths)):  # or Inf - Inf
        unknown = labels.isnan().any(1) & present(tcam, lengths)
        if unknown.any():
            raise InputError(
                f"{loss}: labels are NaN in {int(unknown.sum())} of {len(labels)} recordings (first in recording "
                f"{int(unknown.nonzero()[0])}), expected above 0 where a recording has the class and else 0"
            )


def check_batch(loss: str, tcam: Tensor, embeddings: Tensor, labels: Tensor) -> None:
    check_shape(loss, "tcam", tcam, "B, T, C")
    check_shape(loss, "embeddings", embeddings, "B, T, D")
    check_same(loss, "tcam", tcam, "embeddings", embeddings, 2)
    check_labels(loss, tcam, labels)


def present(x: Tensor, lengths: Tensor | None) -> Tensor:
    """(B,) bool: whether the recording has a snippet; ``x`` is (B, T, ...)."""
    if lengths is None:
        return torch.full(x.shape[:1], x.shape[1] > 0, dtype=torch.bool, device=x.device)
    return lengths > 0
