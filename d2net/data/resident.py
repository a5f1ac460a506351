"""Keeps all features of a dataset on one device and gathers packed batches there, without waiting for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from d2net.data.batches import Batch
from d2net.data.deal import Share, Window
from d2net.data.kept import KeptFeatures, size_of
from d2net.distributed import ALONE, Ranks
from d2net.ops.gaps import Layout


class ResidentFeatures(KeptFeatures):
    """Features and labels of all recordings on a device, of which a CUDA graph can make the batches.

    Args:
        streams: (all snippets + 1, width) for each stream, recording after recording; the last row is zero.
        lengths: Snippets of every recording.
        labels: (recordings, C) float32, multi-hot; on any device.
        batch_size: Recordings of every whole batch.
        max_snippets: The most snippets of a window.
        layout: The network, as of :class:`d2net.data.batches.BatchSampler`.
        ranks: As there.

    Attributes:
        streams: As given.
    """

    def __init__(
        self,
        streams: tuple[Tensor, ...],
        lengths: Sequence[int],
        labels: Tensor,
        *,
        batch_size: int,
        max_snippets: int,
        layout: Layout,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(
            lengths,
            labels,
            streams[0].device,
            batch_size=batch_size,
            max_snippets=max_snippets,
            layout=layout,
            ranks=ranks,
        )
        self.streams = streams
        self._begin = [0, *accumulate(self.lengths)]

    @property
    def where(self) -> str:
        """Where the features are, and how many bytes, in words."""
        return f"all on the device of every process, {size_of(sum(stream.nbytes for stream in self.streams))}"

    def convert(self, dtype: torch.dtype) -> None:
        """Keep the features in another precision from now on."""
        self.streams = tuple(stream.to(dtype) for stream in self.streams)

    def next(self, windows: Sequence[Window]) -> Batch:
        """The batch of these windows of the whole batch, or what this rank has of it, on the device."""
        return self.gather(self.rows(windows).to(self.labels.device, non_blocking=True))

    def rows(self, windows: Sequence[Window]) -> Tensor:
        """Everything that :meth:`gather` needs for a batch, in one tensor on the CPU, so that one copy brings it.

        Args:
            windows: Of ``batch_size`` recordings.

        Returns:
            (N + 3 b + 1,) int64 for the b recordings of this rank, pinned for a GPU, and 2 B + N more with other ranks:
            the row of the streams for each row of the batch, where gaps are the row of zeros, and all else that a batch
            has.
        """
        share = Share(windows, self.ranks)
        return self._rows(share, [self._begin[w.recording] + w.start for w in share.own], self._begin[-1])

    def gather(self, rows: Tensor) -> Batch:
        """The batch of :meth:`rows`, which must be on this device."""
        return self._batch(rows, self._begin[-1], lambda index: tuple(x.index_select(0, index) for x in self.streams))


def streams_of(
    read: Callable[[int], Tensor],
    lengths: Sequence[int],
    widths: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, ...]:
    """The streams of :class:`ResidentFeatures`.

    Args:
        read: Gives (T, all widths) of a recording.
        lengths: T of each.
        widths: Of the streams.
        dtype: In which to keep them.
        device: Where to.
    """
    streams = tuple(torch.empty(sum(lengths) + 1, width, dtype=dtype, device=device) for width in widths)
    first = 0
    for i, length in enumerate(lengths):
        x = read(i).to(device)
        for stream, columns in zip(streams, x.split(list(widths), 1), strict=True):
            stream[first : first + length] = columns
        first += length
    for stream in streams:
        stream[first] = 0
    return streams
