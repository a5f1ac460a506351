"""Mini-batches of recordings: drawn at random, cropped, packed; a resumed run draws the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from d2net.data.dataset import Dataset
from d2net.data.deal import Share, Window, packed_offsets
from d2net.distributed import ALONE, Ranks
from d2net.errors import InputError
from d2net.losses.whole_batch import WholeBatch
from d2net.ops.gaps import Layout

__all__ = ["Batch", "BatchSampler"]

SIZES = 32  # how many numbers of rows a batch can have, so that a CUDA graph for each is enough
ROWS = 64  # batches have a multiple of it


class Batch(NamedTuple):
    """Packed recordings: their rows one after another; before, between and behind them are gap rows, which are 0.

    Attributes:
        parts: (N, width) for each stream; float32, or the precision that :class:`d2net.data.kept.KeptFeatures` are
            kept in. N is a number of :func:`rounded_rows`.
        lengths: (B,) int64, snippets.
        labels: (B, C) float32, multi-hot.
        offsets: (B+1,) int64: recording b begins in row ``offsets[b]``, and the gap behind it ends where the next one
            begins.
        mask: (N,) bool, True in rows that are of a recording.
        max_length: The most snippets of a recording; a length is at most that.
        whole: The batch that these recordings are a part of, where others lie on other ranks.
        numbers: (N,) int64, then: of each row its number among those of the whole batch.
    """

    parts: tuple[Tensor, ...]
    lengths: Tensor
    labels: Tensor
    offsets: Tensor
    mask: Tensor
    max_length: int
    whole: WholeBatch | None = None
    numbers: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        lengths, labels, offsets, mask = (t.to(device) for t in self[1:5])
        parts, whole, numbers = tuple(part.to(device) for part in self.parts), self.whole, self.numbers
        if whole is not None and numbers is not None:
            whole = WholeBatch(whole.labels.to(device), whole.places.to(device), whole.most)
            numbers = numbers.to(device)
        return Batch(parts, lengths, labels, offsets, mask, self.max_length, whole, numbers)


def rounded_rows(rows: int, recordings: int, max_length: int, layout: Layout) -> int:
    """``rows`` rounded up to one of at most 32 numbers: multiples of 64, and what the network adds to those.

    Args:
        rows: Of a batch: the last of :func:`packed_offsets`.
        recordings: B.
        max_length: The most snippets of a recording.
        layout: The network.
    """
    most = layout.reach + recordings * (max_length + layout.reach)
    step = max(ROWS, _up(-(-most // SIZES), ROWS))
    return layout.rows(_up(rows, step))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def labels_of(dataset: Dataset, allow_unlabelled: bool) -> Tensor:
    """(recordings, C) float32, multi-hot.

    Raises:
        InputError: a recording without a label where that is not allowed, or with an unknown class; or no label at all.
    """
    labels = torch.from_numpy(dataset.label_matrix(allow_unlabelled=allow_unlabelled))
    if not labels.any():
        raise InputError(f"dataset '{dataset.name}': no recording has a label, and so there is nothing to learn")
    return labels


class BatchSampler:
    """Draws batches of distinct recordings, without replacement within an epoch.

    A new epoch starts when fewer recordings are left than a batch holds, so that every batch has the same
    size; the few left over differ from epoch to epoch. A dataset smaller than a batch gives batches of all of it.

    Args:
        dataset: The recordings to draw from.
        batch_size: Recordings a batch.
        max_snippets: Longer recordings are cropped to this many snippets, at a random offset.
        layout: The network, which says how wide gaps are and how many rows there may be.
        seed: Of the order and the offsets.
        allow_unlabelled: Whether recordings without a label, which are only background, are drawn like the others.
        ranks: Among which each batch is dealt. The batches are the same, however many there are.

    Attributes:
        max_length: The most snippets that a recording of a batch can have: ``max_snippets``, or the length of the
            longest recording where all lengths are known and none is that long.
        usual_rows: Rows that this rank has of a batch on average, gaps included, where all lengths are known; else the
            most.

    Raises:
        InputError: a recording without a label where that is not allowed, or with an unknown class; no recording, or
            no label at all.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        max_snippets: int,
        layout: Layout,
        seed: int = 0,
        allow_unlabelled: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        if len(dataset) == 0:
            raise InputError(f"dataset '{dataset.name}' holds no recording to train on; check its training subset")
        self.dataset = dataset
        self.batch_size = min(batch_size, len(dataset))
        self.max_snippets = max_snippets
        self.layout, self.ranks = layout, ranks
        self._lengths = [r.snippets for r in dataset.recordings]
        lengths = [max_snippets if r.snippets is None else min(r.snippets, max_snippets) for r in dataset.recordings]
        self.max_length = max(lengths)
        self.usual_rows = round(-(-self.batch_size // ranks.size) * (sum(lengths) / len(lengths) + layout.reach))
        self.labels = labels_of(dataset, allow_unlabelled)
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.randperm(len(dataset), generator=self.generator)
        self.position = 0

    def next(self) -> Batch:
        """The next batch, or what this rank has of it.

        Raises:
            InputError: features that are missing, of another width, empty, NaN or Inf.
        """
        read: dict[int, np.ndarray] = {}  # features of which only reading tells the length
        windows = []
        for i in self._choose():
            snippets = self._lengths[i]
            if snippets is None:
                read[i] = self.dataset.features(i)
                snippets = self._lengths[i] = len(read[i])
            windows.append(self._window(i, snippets))
        share = Share(windows, self.ranks)
        lengths = [w.length for w in share.own]
        offsets = packed_offsets(lengths, self.layout.reach)
        rows = rounded_rows(offsets[-1], len(share.own), self.max_length, self.layout)
        parts = tuple(torch.zeros(rows, width) for width in self.dataset.stream_widths)
        mask = torch.zeros(rows, dtype=torch.bool)
        for window, first in zip(share.own, offsets, strict=False):
            x = read.pop(window.recording, None)
            x = self.dataset.features(window.recording) if x is None else x
            mask[first : first + window.length] = True
            column = 0
            for part in parts:
                cut = x[window.start : window.start + window.length, column : column + part.shape[1]]
                part.numpy()[first : first + window.length] = cut
                column += part.shape[1]
        labels = self.labels[[w.recording for w in share.own]]
        batch = Batch(parts, torch.tensor(lengths), labels, torch.tensor(offsets), mask, share.max_length)
        if self.ranks.size == 1:
            return batch
        all_labels = self.labels[[w.recording for w in share.whole]]
        whole = WholeBatch(all_labels, torch.tensor(share.places), share.most)
        return batch._replace(whole=whole, numbers=torch.from_numpy(share.row_numbers(rows, self.layout.reach)))

    def windows(self, lengths: Sequence[int]) -> list[Window]:
        """The windows of the next whole batch, without reading features; ``lengths`` are those of all recordings."""
        return [self._window(i, lengths[i]) for i in self._choose()]

    def _choose(self) -> list[int]:
        if self.position + self.batch_size > len(self.order):
            self.order = torch.randperm(len(self.order), generator=self.generator)
            self.position = 0
        chosen = self.order[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        return chosen.tolist()

    def _window(self, recording: int, snippets: int) -> Window:
        spare = snippets - self.max_snippets
        if spare <= 0:
            return Window(recording, 0, snippets)
        start = int(torch.randint(spare + 1, (), generator=self.generator))
        return Window(recording, start, self.max_snippets)

    def state(self) -> dict[str, Tensor]:
        """Everything that decides the next batches: the epoch's order, the position in it, the generator."""
        return {
            "order": self.order,
            "position": torch.tensor(self.position),
            "generator": self.generator.get_state(),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue where :meth:`state` was taken.

        Raises:
            InputError: the dataset has another size, or the state is damaged.
        """
        if len(state["order"]) != len(self.dataset):
            raise InputError(
                f"the checkpoint was trained on {len(state['order'])} recordings, '{self.dataset.name}' has "
                f"{len(self.dataset)}; resume with the same data or train anew"
            )
        order, position = state["order"], int(state["position"])
        if not torch.equal(order.sort().values, torch.arange(len(order))) or not 0 <= position <= len(order):
            raise InputError("the checkpoint's order of recordings is damaged; use another copy or train anew")
        self.order, self.position = order, position
        self.generator.set_state(state["generator"])
