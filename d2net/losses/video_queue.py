"""The recordings seen last, which give L_DV more of them than a batch has."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from d2net.ops.precision import kept_in_float32


class VideoQueue(nn.Module):
    """The class scores p and the labels of the last recordings that counted, newest first.

    U_2 of Eq. 10 has at most the rank of the labels that it is made of: a batch of 10 recordings never has all of 20
    classes, and a class that comes with another one in the whole batch cannot be told from it. P_2 and Y_2 of the batch
    and the queue have a higher rank, and what occurs together by chance averages out. Gradients reach the batch only:
    scores in the queue are those of the weights when they were seen.

    Args:
        size: N, the number of recordings.
        num_classes: C.

    Attributes:
        pooled: (N, C) buffer, the scores p. At least float32, as ``labels``.
        labels: (N, C) buffer.
        counted: (N,) int64 buffer, above 0 where there is a recording.
    """

    pooled: Tensor
    labels: Tensor
    counted: Tensor

    def __init__(self, size: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("pooled", torch.zeros(size, num_classes, dtype=torch.float32))
        self.register_buffer("labels", torch.zeros(size, num_classes, dtype=torch.float32))
        self.register_buffer("counted", torch.zeros(size, dtype=torch.int64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VideoQueue:
        pooled, labels = self.pooled, self.labels
        super()._apply(fn, recurse)
        self.pooled, self.labels = kept_in_float32(pooled, self.pooled), kept_in_float32(labels, self.labels)
        return self

    def after(self, pooled: Tensor, counted: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Those of the batch, and below them those of the queue.

        Args:
            pooled: (B, C).
            counted: (B,) int64, above 0 where a recording counts.
            labels: (B, C).

        Returns:
            The same three, of B + N recordings.
        """
        together = ((pooled, self.pooled), (counted, self.counted), (labels.to(pooled.dtype), self.labels))
        pooled, counted, labels = (torch.cat(pair) for pair in together)
        return pooled, counted, labels

    @torch.no_grad()
    def push(self, pooled: Tensor, counted: Tensor, labels: Tensor) -> None:
        """Put the recordings that count in front; those past N are forgotten. Arguments: see :meth:`after`."""
        together = self.after(pooled, counted, labels)
        newest = (together[1] == 0).byte().argsort(stable=True)[: len(self.counted)]
        for kept, new in zip((self.pooled, self.counted, self.labels), together, strict=True):
            kept.copy_(new[newest])
