"""The streams of the network in plain PyTorch, for any device, with the types of their inputs, settings and results."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from d2net.ops.precision import at_least_float32

SLOPE = 0.2  # of the leaky ReLUs (Sec. 4, implementation details)


class StreamWeights(NamedTuple):
    """Weights (width out, width in, k) and biases (width out,) of one stream's three convolutions."""

    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor
    classifier: Tensor
    classifier_bias: Tensor


class NetworkSettings(NamedTuple):
    """What the recipe says of the streams."""

    dilation: int = 1
    residual: bool = False  # the input of each of the first two layers is added to its output
    dropout: float = 0.0  # before the classifier; needs a seed, else there is none
    dropout_embeddings: bool = False  # x(t) is what has passed the dropout


class NetworkInputs(NamedTuple):
    """Packed rows.

    Attributes:
        mask: (N,) bool, whether a row belongs to a recording. The first and the last rows do not, as many as the
            widest kernel reaches; nor do as many between any two recordings.
        x_a: (N, width) features of the first stream, 0 where ``mask`` is False.
        x_b: The same of the second stream, or None.
        seed: (1,) int64, of the dropout; None: no dropout.
        numbers: (N,) int64, of the rows in the whole batch, where these are some of its recordings: a row's number
            decides which of its elements the dropout keeps. Any from 0 on, and anything in gaps; None: 0 to N - 1.
    """

    mask: Tensor
    x_a: Tensor
    x_b: Tensor | None
    seed: Tensor | None
    numbers: Tensor | None = None


def network_ref(
    inputs: NetworkInputs, weights: tuple[Tensor | None, ...], settings: NetworkSettings
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Logits of both streams, TCAM and embeddings, as :func:`d2net.ops.network.network` gives them."""
    past = ~inputs.mask[:, None]
    embeddings, logits = [], []
    for s, x in enumerate((inputs.x_a, inputs.x_b)):
        if x is None:
            continue
        x = x.masked_fill(past, 0)  # so that gaps have no gradient
        of = StreamWeights(*weights[6 * s : 6 * s + 6])  # type: ignore[arg-type]
        for weight, bias in ((of.first, of.first_bias), (of.second, of.second_bias)):
            y = F.leaky_relu(_convolution(x, weight, bias, settings.dilation).masked_fill(past, 0), SLOPE)
            x = x + y if settings.residual else y
        dropped = x
        if inputs.seed is not None and settings.dropout > 0:
            # The seeds of two streams are neighbours; their generators begin apart, as SplitMix64's do.
            kept, scale = dropout_ref(inputs.seed + s, len(x), x.shape[1], settings.dropout, inputs.numbers)
            dropped = torch.where(kept, x * scale, 0)
        embeddings.append(dropped if settings.dropout_embeddings else x)
        y = _convolution(dropped, of.classifier, of.classifier_bias, settings.dilation)
        logits.append(at_least_float32(y).masked_fill(past, 0))
    tcam = torch.stack([y.sigmoid() for y in logits]).mean(0).masked_fill(past, 0)
    mean = embeddings[0] if len(embeddings) == 1 else 0.5 * (embeddings[0] + embeddings[1])
    return logits[0], logits[1] if len(logits) == 2 else None, tcam, mean


def _convolution(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if len(x) == 0:  # PyTorch's convolutions refuse that
        return F.linear(x, weight[:, :, 0], bias)
    padding = weight.shape[2] // 2 * dilation
    return F.conv1d(x.T[None], weight, bias, padding=padding, dilation=dilation)[0].T


def dropout_ref(seed: Tensor, n: int, d: int, share: float, numbers: Tensor | None = None) -> tuple[Tensor, float]:
    """Which of (n, d) elements the dropout keeps, and the factor of these: csrc/math/dropout.h in int64 arithmetic.

    16 random bits decide on an element, so that the share is a multiple of 1 / 65536; the factor is that of this share.
    They are the ones of the row's number, (n,) ``numbers`` or 0 to n - 1.
    """
    threshold = min(int(share * 65536 + 0.5), 65535)
    words = 2 * ((d + 7) // 8)  # of 64 random bits in a row, four elements a word
    if numbers is None:
        numbers = torch.arange(n, device=seed.device)
    places = numbers[:, None] * words + torch.arange(words, device=seed.device)
    z = seed + (places.flatten() + 1) * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    z = z ^ _shifted(z, 31)
    parts = torch.stack([_shifted(z, 16 * i) & 0xFFFF for i in range(4)], 1)
    return parts.view(n, 4 * words)[:, :d] >= threshold, 65536 / (65536 - threshold)


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def _shifted(x: Tensor, bits: int) -> Tensor:
    """``x`` >> bits of numbers without sign."""
    return x if bits == 0 else (x >> bits) & (2 ** (64 - bits) - 1)
