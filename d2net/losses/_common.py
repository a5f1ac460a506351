"""What the loss terms share. Nothing here waits for a device."""

from __future__ import annotations

import torch
from torch import Tensor

from d2net.errors import InputError
from d2net.ops._checks import as_lengths, as_tensors, check_activations, check_same, check_shape
from d2net.ops._native import at_least_float32


def check_choice(name: str, value: str, *known: str) -> None:
    if value not in known:
        raise InputError(f"{name} is '{value}', expected {' or '.join(known)}")


def take_scores(
    loss: str, tcam: Tensor, lengths: Tensor | None, labels: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Class activations, lengths and labels of a batch, as tensors and checked; half precision becomes float32."""
    tcam, labels = as_tensors(loss, tcam=tcam, labels=labels)
    check_labels(loss, tcam, labels)
    lengths = as_lengths(loss, lengths, tcam)
    check_activations(loss, "tcam", tcam, lengths)
    return at_least_float32(tcam), lengths, labels


def take_batch(
    loss: str, tcam: Tensor, embeddings: Tensor, lengths: Tensor | None, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Class activations, embeddings, lengths and labels of a batch, as tensors and checked.

    Activations in half precision become float32, so that a gradient is rounded once, when it is whole. Embeddings stay:
    the operators that read them sum in float32.
    """
    tcam, embeddings, labels = as_tensors(loss, tcam=tcam, embeddings=embeddings, labels=labels)
    check_batch(loss, tcam, embeddings, labels)
    lengths = as_lengths(loss, lengths, tcam)
    check_activations(loss, "tcam", tcam, lengths)
    return at_least_float32(tcam), embeddings, lengths, labels


def check_labels(loss: str, tcam: Tensor, labels: Tensor) -> None:
    check_shape(loss, "tcam", tcam, "B, T, C")
    if labels.shape != (tcam.shape[0], tcam.shape[2]) or labels.device != tcam.device:
        raise InputError(
            f"{loss}: labels have shape {tuple(labels.shape)} on {labels.device}, expected multi-hot "
            f"({tcam.shape[0]}, {tcam.shape[2]}) on {tcam.device}"
        )


def check_batch(loss: str, tcam: Tensor, embeddings: Tensor, labels: Tensor) -> None:
    check_shape(loss, "tcam", tcam, "B, T, C")
    check_shape(loss, "embeddings", embeddings, "B, T, D")
    check_same(loss, "tcam", tcam, "embeddings", embeddings, 2)
    check_labels(loss, tcam, labels)


def present(x: Tensor, lengths: Tensor | None) -> Tensor:
    """(B,) bool: the recording of ``x`` (B, T, ...) has a snippet."""
    if lengths is None:
        return torch.full(x.shape[:1], x.shape[1] > 0, dtype=torch.bool, device=x.device)
    return lengths > 0
