"""Keeps all features of a dataset on one device and gathers packed batches there, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from d2net.data.batches import Batch, rounded_rows
from d2net.data.dataset import Dataset
from d2net.data.deal import Share, Window, packed_offsets
from d2net.distributed import ALONE, Ranks
from d2net.losses.whole_batch import WholeBatch
from d2net.ops.gaps import Layout


class ResidentFeatures:
    """Features and labels of all recordings on a device.

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
        lengths: As given.
        labels: On the device of the streams.
        max_length: Of every batch: the longest recording, or ``max_snippets`` where that is less.
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
        self.streams = streams
        self.lengths = list(lengths)
        self.labels = labels.to(streams[0].device)
        self.batch_size, self.layout, self.ranks = batch_size, layout, ranks
        self._own = batch_size // ranks.size + (ranks.rank < batch_size % ranks.size)  # recordings of this rank
        self.max_length = min(max_snippets, max(self.lengths))
        self._begin = [0, *accumulate(self.lengths)]

    @classmethod
    def load(
        cls,
        dataset: Dataset,
        device: torch.device,
        *,
        batch_size: int,
        max_snippets: int,
        layout: Layout,
        dtype: torch.dtype = torch.float32,
        budget: float = float("inf"),
        ranks: Ranks = ALONE,
    ) -> ResidentFeatures | None:
        """Read all features; None if they take more than ``budget`` bytes. A recording may have no label.

        Args:
            dataset: All recordings.
            device: Where to keep them.
            batch_size: Recordings of every whole batch.
            max_snippets: The most snippets of a window.
            layout: The network, as of :class:`d2net.data.batches.BatchSampler`.
            dtype: In which to keep the features.
            budget: In bytes.
            ranks: As of :class:`d2net.data.batches.BatchSampler`.

        Raises:
            InputError: features that are missing, of another width, empty, NaN or Inf.
        """
        lengths = [
            len(dataset.features(i)) if r.snippets is None else r.snippets for i, r in enumerate(dataset.recordings)
        ]
        if sum(lengths) * dataset.width * dtype.itemsize > budget:
            return None
        streams = tuple(
            torch.empty(sum(lengths) + 1, width, dtype=dtype, device=device) for width in dataset.stream_widths
        )
        first = 0
        for i, length in enumerate(lengths):
            x = torch.from_numpy(np.require(dataset.features(i), requirements=["C", "W"])).to(device)
            for stream, columns in zip(streams, x.split(dataset.stream_widths, 1), strict=True):
                stream[first : first + length] = columns
            first += length
        for stream in streams:
            stream[first] = 0
        labels = torch.from_numpy(dataset.label_matrix(allow_unlabelled=True))
        return cls(
            streams, lengths, labels, batch_size=batch_size, max_snippets=max_snippets, layout=layout, ranks=ranks
        )

    def convert(self, dtype: torch.dtype) -> None:
        """Keep the features in another precision from now on."""
        self.streams = tuple(stream.to(dtype) for stream in self.streams)

    def rows(self, windows: Sequence[Window]) -> Tensor:
        """Everything that :meth:`gather` needs for a batch, in one tensor on the CPU, so that one copy brings it.

        Pinned for a GPU. PyTorch keeps such memory when a tensor of it ends, and gives it to another one only when the
        copies from it are done, so nobody has to wait for the copy.

        Args:
            windows: Of ``batch_size`` recordings.

        Returns:
            (N + 3 b + 1,) int64, for the b recordings of this rank: the row of the streams for each row of the batch,
            where gaps are the row of zeros; the lengths; the offsets; the recordings. With other ranks there are
            2 B + N more, for the B recordings of the whole batch: the recordings; the places of
            :class:`d2net.losses.WholeBatch`; of each row its number in the whole batch.
        """
        share = Share(windows, self.ranks)
        lengths = [w.length for w in share.own]
        offsets = packed_offsets(lengths, self.layout.reach)
        n = rounded_rows(offsets[-1], len(share.own), self.max_length, self.layout)
        of_whole = 0 if self.ranks.size == 1 else 2 * len(share.whole) + n
        own = n + 3 * len(share.own) + 1
        rows = torch.empty(own + of_whole, dtype=torch.int64, pin_memory=self.labels.is_cuda)
        host = rows.numpy()
        host[:n] = self._begin[-1]
        for window, offset in zip(share.own, offsets, strict=False):
            first = self._begin[window.recording] + window.start
            host[offset : offset + window.length] = np.arange(first, first + window.length)
        host[n:own] = [*lengths, *offsets, *(w.recording for w in share.own)]
        if of_whole:
            host[own : own + of_whole - n] = [*(w.recording for w in share.whole), *share.places]
            host[own + of_whole - n :] = share.row_numbers(n, self.layout.reach)
        return rows

    def gather(self, rows: Tensor) -> Batch:
        """The batch of :meth:`rows`, which must be on this device."""
        b, alone = self._own, self.ranks.size == 1
        of_whole = 0 if alone else 2 * self.batch_size
        n = (len(rows) - 3 * b - 1 - of_whole) // (1 if alone else 2)
        index, lengths, offsets, recordings, *rest = rows.split(
            [n, b, b + 1, b] + ([] if alone else [self.batch_size, self.batch_size, n])
        )
        parts = tuple(stream.index_select(0, index) for stream in self.streams)
        labels = self.labels[recordings]  # index_select takes several times as long for so few
        batch = Batch(parts, lengths, labels, offsets, index < self._begin[-1], self.max_length)
        if alone:
            return batch
        of_all, places, numbers = rest
        most = -(-self.batch_size // self.ranks.size)
        return batch._replace(whole=WholeBatch(self.labels[of_all], places, most), numbers=numbers)
