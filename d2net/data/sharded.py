"""Keeps the features of a dataset on the devices of all ranks together, each of which sends the others what they need.

In every step each rank sends windows of the recordings that it keeps, and gets those of its part of the batch: one
all-to-all. All ranks know the windows of the whole batch and who keeps what, so only features are sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from d2net.data.batches import Batch
from d2net.data.deal import Share, Window
from d2net.data.kept import KeptFeatures, size_of
from d2net.distributed import Ranks, lost_ranks
from d2net.ops.gaps import Layout


class ShardedFeatures(KeptFeatures):
    """Features of this rank's share of the recordings on its device; labels of all.

    A CUDA graph cannot hold its batches: how much is sent is another number in every step.

    Args:
        features: (snippets of the share, all widths), recording after recording, on the device.
        shares: The recordings that each rank keeps, in the order of the features.
        widths: Of the streams.
        lengths: Snippets of every recording.
        labels: (recordings, C) float32, multi-hot; on any device.
        batch_size: Recordings of every whole batch.
        max_snippets: The most snippets of a window.
        layout: The network, as of :class:`d2net.data.batches.BatchSampler`.
        ranks: Those that share.

    Attributes:
        features: As given.
    """

    def __init__(
        self,
        features: Tensor,
        shares: Sequence[Sequence[int]],
        widths: Sequence[int],
        lengths: Sequence[int],
        labels: Tensor,
        *,
        batch_size: int,
        max_snippets: int,
        layout: Layout,
        ranks: Ranks,
    ) -> None:
        super().__init__(
            lengths,
            labels,
            features.device,
            batch_size=batch_size,
            max_snippets=max_snippets,
            layout=layout,
            ranks=ranks,
        )
        self.features, self._widths = features, list(widths)
        self._keeper = {i: rank for rank, some in enumerate(shares) for i in some}
        mine = shares[ranks.rank]
        self._begin = dict(zip(mine, accumulate((self.lengths[i] for i in mine), initial=0), strict=False))

    @property
    def where(self) -> str:
        """Where the features are, and how many bytes, in words."""
        whole = sum(self.lengths) * self.features.shape[1] * self.features.element_size()
        return (
            f"shared among the devices of {self.ranks.size} processes, {size_of(self.features.nbytes)} of "
            f"{size_of(whole)} on this one"
        )

    def convert(self, dtype: torch.dtype) -> None:
        """Keep and send the features in another precision from now on."""
        self.features = self.features.to(dtype)

    def next(self, windows: Sequence[Window]) -> Batch:
        """The batch of these windows of the whole batch, or what this rank has of it. All ranks must call it.

        Raises:
            RankEnded: another rank has ended.
        """
        share = Share(windows, self.ranks)
        to_each = [[w for w in (share.whole[i] for i in some) if w.recording in self._begin] for some in share.dealt]
        send = [sum(w.length for w in some) for some in to_each]
        # What comes, by who sends it; of each in the order of the batch.
        receive = [0] * self.ranks.size
        for w in share.own:
            receive[self._keeper[w.recording]] += w.length
        free = list(accumulate(receive, initial=0))
        begins = []
        for w in share.own:
            keeper = self._keeper[w.recording]
            begins.append(free[keeper])
            free[keeper] += w.length
        zero = sum(receive)
        rows = self._rows(share, begins, zero)

        sent = self._taken([w for some in to_each for w in some])
        got = sent.new_empty(zero + 1, sent.shape[1])
        got[zero] = 0
        with lost_ranks():
            dist.all_to_all_single(got[:zero], sent, receive, send)
        return self._batch(
            rows.to(sent.device, non_blocking=True),
            zero,
            lambda index: tuple(x.index_select(0, index) for x in got.split(self._widths, 1)),
        )

    def _taken(self, windows: Sequence[Window]) -> Tensor:
        """The features of windows of this rank's share, one after another."""
        index = torch.empty(sum(w.length for w in windows), dtype=torch.int64, pin_memory=self.features.is_cuda)
        end = 0
        for w in windows:
            begin = self._begin[w.recording] + w.start
            index.numpy()[end : end + w.length] = np.arange(begin, begin + w.length)
            end += w.length
        return self.features.index_select(0, index.to(self.features.device, non_blocking=True))
