"""Features that are read once, before a training, from which every batch is made: what all ways to keep them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from d2net.data.batches import Batch, rounded_rows
from d2net.data.deal import Share, Window, packed_offsets
from d2net.distributed import ALONE, Ranks
from d2net.losses.whole_batch import WholeBatch
from d2net.ops.gaps import Layout


class KeptFeatures(ABC):
    """The features of a dataset; :func:`d2net.data.keeping.keep_features` chooses how they are kept.

    Args:
        lengths: Snippets of every recording.
        labels: (recordings, C) float32, multi-hot; on any device.
        device: Of the batches.
        batch_size: Recordings of every whole batch.
        max_snippets: The most snippets of a window.
        layout: The network, as of :class:`d2net.data.batches.BatchSampler`.
        ranks: As there.

    Attributes:
        lengths: As given.
        labels: On the device.
        max_length: Of every batch: the longest recording, or ``max_snippets`` where that is less.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        labels: Tensor,
        device: torch.device,
        *,
        batch_size: int,
        max_snippets: int,
        layout: Layout,
        ranks: Ranks = ALONE,
    ) -> None:
        self.lengths = list(lengths)
        self.labels = labels.to(device)
        self.batch_size, self.layout, self.ranks = batch_size, layout, ranks
        self._own = batch_size // ranks.size + (ranks.rank < batch_size % ranks.size)  # recordings of this rank
        self.max_length = min(max_snippets, max(self.lengths))

    @property
    @abstractmethod
    def where(self) -> str:
        """Where the features are, and how many bytes, in words."""

    @abstractmethod
    def next(self, windows: Sequence[Window]) -> Batch:
        """The batch of these windows of the whole batch, or what this rank has of it, on the device."""

    @abstractmethod
    def convert(self, dtype: torch.dtype) -> None:
        """Give the features in another precision from now on."""

    def _rows(self, share: Share, begins: Sequence[int], zero: int) -> Tensor:
        """Everything but the features themselves that :meth:`_batch` needs, on the CPU, so that one copy brings it.

        Pinned for a GPU. PyTorch keeps such memory when a tensor of it ends, and gives it to another one only when the
        copies from it are done, so nobody has to wait for the copy.

        Args:
            share: Of ``batch_size`` recordings.
            begins: Of each window of this rank the row from which it is taken, and those behind it.
            zero: The row that gaps are taken from.

        Returns:
            (N + 3 b + 1,) int64, for the b recordings of this rank: from where each row of the batch is taken; the
            lengths; the offsets; the recordings. With other ranks there are 2 B + N more, for the B recordings of the
            whole batch: the recordings; the places of :class:`d2net.losses.WholeBatch`; of each row its number in the
            whole batch.
        """
        lengths = [w.length for w in share.own]
        offsets = packed_offsets(lengths, self.layout.reach)
        n = rounded_rows(offsets[-1], len(share.own), self.max_length, self.layout)
        of_whole = 0 if self.ranks.size == 1 else 2 * len(share.whole) + n
        own = n + 3 * len(share.own) + 1
        rows = torch.empty(own + of_whole, dtype=torch.int64, pin_memory=self.labels.is_cuda)
        host = rows.numpy()
        host[:n] = zero
        for begin, length, offset in zip(begins, lengths, offsets, strict=False):
            host[offset : offset + length] = np.arange(begin, begin + length)
        host[n:own] = [*lengths, *offsets, *(w.recording for w in share.own)]
        if of_whole:
            host[own : own + of_whole - n] = [*(w.recording for w in share.whole), *share.places]
            host[own + of_whole - n :] = share.row_numbers(n, self.layout.reach)
        return rows

    def _batch(self, rows: Tensor, zero: int, take: Callable[[Tensor], tuple[Tensor, ...]]) -> Batch:
        """The batch of :meth:`_rows`, on the device, with the same ``zero``.

        Args:
            rows: On the device.
            zero: The row that gaps are taken from.
            take: Gives (N, width) of each stream, for (N,) rows.
        """
        b, alone = self._own, self.ranks.size == 1
        of_whole = 0 if alone else 2 * self.batch_size
        n = (len(rows) - 3 * b - 1 - of_whole) // (1 if alone else 2)
        index, lengths, offsets, recordings, *rest = rows.split(
            [n, b, b + 1, b] + ([] if alone else [self.batch_size, self.batch_size, n])
        )
        labels = self.labels[recordings]  # index_select takes several times as long for so few
        batch = Batch(take(index), lengths, labels, offsets, index < zero, self.max_length)
        if alone:
            return batch
        of_all, places, numbers = rest
        most = -(-self.batch_size // self.ranks.size)
        return batch._replace(whole=WholeBatch(self.labels[of_all], places, most), numbers=numbers)


def size_of(number: int) -> str:
    """A number of bytes, in words."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number / 1e3:.1f} kB"
