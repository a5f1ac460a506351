"""Keeps all features of a dataset on one device and gathers batches of one shape there, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from d2net.data.batches import Batch, Window
from d2net.data.dataset import Dataset


class ResidentFeatures:
    """Features and labels of all recordings on a device.

    Attributes:
        features: (all snippets + 1, W) float32, recording after recording; the last row is zero.
        labels: (recordings, C) float32, multi-hot.
        lengths: snippets of every recording.
        snippets: T of every batch: the longest recording, or ``max_snippets`` where that is less.
    """

    def __init__(self, parts: Sequence[Tensor], labels: Tensor, *, max_snippets: int) -> None:
        self.lengths = [len(x) for x in parts]
        self.snippets = min(max_snippets, max(self.lengths))
        self.features = torch.cat([*parts, parts[0].new_zeros(1, parts[0].shape[1])])
        self.labels = labels.to(self.features.device)
        self._begin = [0, *accumulate(self.lengths)]

    @classmethod
    def load(
        cls, dataset: Dataset, device: torch.device, *, max_snippets: int, budget: float = float("inf")
    ) -> ResidentFeatures | None:
        """Read all features; None if they take more than ``budget`` bytes. A recording may have no label.

        Raises:
            InputError: features that are missing, of another width, empty, NaN or Inf.
        """
        parts, size = [], 0
        for i in range(len(dataset)):
            x = dataset.features(i)
            size += x.nbytes
            if size > budget:
                return None
            parts.append(torch.tensor(x, device=device))
        return cls(parts, torch.from_numpy(dataset.label_matrix(allow_unlabelled=True)), max_snippets=max_snippets)

    def rows(self, windows: Sequence[Window]) -> Tensor:
        """(3, B) int64 on the CPU, pinned for a GPU: recording, row of the first snippet, snippets of each window."""
        rows = torch.tensor([(w.recording, self._begin[w.recording] + w.start, w.length) for w in windows]).T
        rows = rows.contiguous()
        return rows.pin_memory() if self.features.is_cuda else rows

    def gather(self, rows: Tensor) -> Batch:
        """The batch of :meth:`rows`, which must be on this device, padded to ``snippets``."""
        recording, first, length = rows
        time = torch.arange(self.snippets, device=rows.device)
        index = torch.where(time < length[:, None], first[:, None] + time, len(self.features) - 1)
        features = self.features.index_select(0, index.flatten()).view(*index.shape, -1)
        return Batch(features, length, self.labels.index_select(0, recording))
