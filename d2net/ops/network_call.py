"""What a call of the network's operator and its backward have in common: sizes, weights, and what is kept between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2net.ops import _native
from d2net.ops.network_ref import SLOPE, NetworkInputs, NetworkSettings, StreamWeights
from d2net.ops.temporal_conv import reversed_taps

BITS = 8  # elements of a row that one byte of signs tells of: kBitsOf of csrc/network.h
BLOCK_ROWS = 16  # rows of one partial sum of a bias' gradient: kBlockRows there
ALIGNED = 8  # products of matrices are fast where rows are multiples of 16 bytes
Weights = Sequence[Tensor | None]  # six of each stream: StreamWeights
# Positions of the operator's arguments: NetworkInputs, two products of first layers, weights, copies, settings.
AT_PRODUCTS = len(NetworkInputs._fields)
AT_WEIGHTS = AT_PRODUCTS + 2
AT_COPIES = AT_WEIGHTS + 12


class NetworkCopies(NamedTuple):
    """The weights of all streams as the products read them, in the type that they compute in.

    Attributes:
        first: (D, k, width) of each stream.
        second: (D, k, D) of each stream.
        reversed_second: (k D, D) of each stream: see :func:`d2net.ops.temporal_conv.reversed_taps`.
        classifier: (streams, row, D): C k rows of each stream, and zeros up to a multiple of 8.
    """

    first: list[Tensor]
    second: list[Tensor]
    reversed_second: list[Tensor]
    classifier: Tensor

    def flat(self) -> list[Tensor]:
        """As the operator takes them."""
        return [*self.first, *self.second, *self.reversed_second, self.classifier]

    @classmethod
    def blank(cls, streams: Sequence[StreamWeights], dtype: torch.dtype) -> NetworkCopies:
        """Zeros."""
        like, n = streams[0].first, len(streams)
        made = [torch.zeros(size, dtype=dtype, device=like.device) for size in sizes_of_copies(streams)]
        return cls(made[:n], made[n : 2 * n], made[2 * n : 3 * n], made[-1])


def sizes_of_copies(streams: Sequence[StreamWeights]) -> list[tuple[int, ...]]:
    """Of :meth:`NetworkCopies.flat`."""
    c, d, taps = streams[0].classifier.shape
    layers = [[(len(w), w.shape[2], w.shape[1]) for w in (of.first, of.second)] for of in streams]
    turned = [(k * out, width) for _, (out, k, width) in layers]
    return [
        *(first for first, _ in layers),
        *(second for _, second in layers),
        *turned,
        (len(streams), row_of(c, taps), d),
    ]


def row_of(c: int, taps: int) -> int:
    """Numbers of a row of the classifier's products."""
    return -(-c * taps // ALIGNED) * ALIGNED


class Arguments(NamedTuple):
    """Of the operator.

    Attributes:
        rows: The features and what belongs to their rows.
        products: (N, D) of the first layer of each stream, where they are computed apart; else None.
        weights: Twelve, of which those of a second stream may be None.
        copies: :meth:`NetworkCopies.flat`, or empty.
        settings: Of the recipe.
    """

    rows: NetworkInputs
    products: tuple[Tensor | None, ...]
    weights: tuple[Any, ...]
    copies: list[Tensor]
    settings: NetworkSettings

    @classmethod
    def of(cls, *arguments: Any) -> Arguments:
        rows, products = arguments[:AT_PRODUCTS], arguments[AT_PRODUCTS:AT_WEIGHTS]
        weights, (copies, *settings) = arguments[AT_WEIGHTS:AT_COPIES], arguments[AT_COPIES:]
        return cls(NetworkInputs(*rows), products, weights, copies, NetworkSettings(*settings))


class Call:
    """The features, weights and sizes of a call.

    Args:
        x_a: (N, width).
        x_b: The same, or None.
        weights: Of both streams.
        copies: Of the weights, :meth:`NetworkCopies.flat`; empty: they are made.
    """

    def __init__(self, x_a: Tensor, x_b: Tensor | None, weights: Weights, copies: Sequence[Tensor] = ()) -> None:
        self.x = [x for x in (x_a, x_b) if x is not None]
        self.of = [StreamWeights(*weights[6 * s : 6 * s + 6]) for s in range(len(self.x))]  # type: ignore[arg-type]
        self.n, self.dtype, self.sums = x_a.shape[0], x_a.dtype, _native.accumulator(x_a.dtype)
        self.d, self.c = len(self.of[0].second), len(self.of[0].classifier)
        self.k, self.taps = self.of[0].first.shape[2], self.of[0].classifier.shape[2]
        self.bytes = (self.d + BITS - 1) // BITS
        self.row = row_of(self.c, self.taps)
        self._copies = copies

    def first(self, s: int) -> Tensor:
        """(D, k, width) of stream s; a view where the weight lies so in memory."""
        return self._copies[s] if self._copies else self._weight(self.of[s].first)

    def second(self, s: int) -> Tensor:
        return self._copies[len(self.x) + s] if self._copies else self._weight(self.of[s].second)

    def reversed_second(self, s: int) -> Tensor:
        return self._copies[2 * len(self.x) + s] if self._copies else reversed_taps(self.second(s))

    def classifier(self) -> Tensor:
        if self._copies:
            return self._copies[-1]
        result = self.x[0].new_zeros(len(self.x), self.row, self.d)
        for to, of in zip(result, self.of, strict=True):
            to[: self.c * self.taps].view(self.c, self.taps, self.d).copy_(of.classifier.permute(0, 2, 1))
        return result

    def _weight(self, weight: Tensor) -> Tensor:
        return weight.permute(0, 2, 1).to(self.dtype).contiguous()

    def bias(self, s: int, name: str) -> Tensor | None:
        return getattr(self.of[s], name).to(self.sums).contiguous() if s < len(self.of) else None

    def blank(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.x[0].new_empty(size, dtype=dtype)

    def layer(self, settings: NetworkSettings, s: int, drops: bool, mask: Tensor, share: float) -> tuple[Any, ...]:
        """The first members of csrc/network.h's StreamLayer."""
        numbers = SLOPE, settings.dropout, share
        return *numbers, self.n, self.d, s, drops and settings.dropout_embeddings, mask

    def head(self, settings: NetworkSettings, mask: Tensor, of_taps: Tensor | None) -> tuple[Any, ...]:
        """The first members of its ClassHead."""
        sizes = self.n, self.c, self.taps, settings.dilation, len(self.x), self.row
        return *sizes, mask, of_taps, self.bias(0, "classifier_bias"), self.bias(1, "classifier_bias")

    def results(self, drops: bool, dropout_embeddings: bool) -> list[Tensor]:
        """Uninitialised: logits of both streams, TCAM, embeddings, then what the backward reads.

        That is: x of the first layer (streams, N, D), what the classifier reads (streams, N, D) unless that is the
        embeddings, the signs of both layers (2, streams, N, bytes), and what the dropout kept (streams, N, bytes).
        """
        s, n, d, c, new = len(self.x), self.n, self.d, self.c, self.blank
        alone = s == 1 and (dropout_embeddings or not drops)
        return [
            *(new(n if i < s else 0, c, dtype=self.sums) for i in range(2)),
            new(n, c, dtype=self.sums),
            new(n, d),
            new(s, n, d),
            new(0 if alone else s, n, d),
            new(2, s, n, self.bytes, dtype=torch.uint8),
            new(s if drops else 0, n, self.bytes, dtype=torch.uint8),
        ]

    def gradients(self, weights: Weights, need: Sequence[bool], apart: bool) -> list[Tensor]:
        """Uninitialised: of the features of both streams, empty where not needed, and of the twelve weights.

        ``apart``: in place of the first layers' weights, of their products.
        """
        inputs = [self.blank(*(x.shape if wanted else (0,))) for x, wanted in zip(self.x, need, strict=False)]
        inputs += [self.blank(0)] * (2 - len(inputs))
        order = {3: (0, 2, 1), 1: (0,)}
        sizes = [(0,) if w is None else tuple(w.shape[i] for i in order[w.ndim]) for w in weights]
        of_weights = [self.blank(*size, dtype=self.of[0].first.dtype) for size in sizes]
        for s in range(len(self.x) if apart else 0):
            of_weights[6 * s] = self.blank(self.n, self.d)
        return [*inputs, *of_weights]
