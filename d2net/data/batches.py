"""Mini-batches of recordings: drawn at random, cropped, padded; a resumed run draws the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from d2net.data.dataset import Dataset
from d2net.errors import InputError


class Batch(NamedTuple):
    """Padded recordings.

    Attributes:
        features: (B, T, W) float32, zero past a recording's length.
        lengths: (B,) int64, snippets.
        labels: (B, C) float32, multi-hot.
    """

    features: Tensor
    lengths: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(*(t.to(device) for t in self))


class Window(NamedTuple):
    """Snippets ``start`` to ``start + length`` of the recording with index ``recording``."""

    recording: int
    start: int
    length: int


class BatchSampler:
    """Draws batches of distinct recordings, without replacement within an epoch.

    A new epoch starts when fewer recordings are left than a batch holds, so that every batch has the same
    size; the few left over differ from epoch to epoch. A dataset smaller than a batch gives batches of all of it.

    Args:
        dataset: The recordings to draw from.
        batch_size: Recordings a batch.
        max_snippets: Longer recordings are cropped to this many snippets, at a random offset.
        seed: Of the order and the offsets.
        allow_unlabelled: Whether recordings without a label, which are only background, are drawn like the others.

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
        seed: int = 0,
        allow_unlabelled: bool = False,
    ) -> None:
        if len(dataset) == 0:
            raise InputError(f"dataset '{dataset.name}' holds no recording to train on; check its training subset")
        self.dataset = dataset
        self.batch_size = min(batch_size, len(dataset))
        self.max_snippets = max_snippets
        self.labels = torch.from_numpy(dataset.label_matrix(allow_unlabelled=allow_unlabelled))
        if not self.labels.any():
            raise InputError(f"dataset '{dataset.name}': no recording has a label, and so there is nothing to learn")
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.randperm(len(dataset), generator=self.generator)
        self.position = 0

    def next(self) -> Batch:
        """The next batch.

        Raises:
            InputError: features that are missing, of another width, empty, NaN or Inf.
        """
        features, windows = [], []
        for i in self._choose():
            x = self.dataset.features(i)
            window = self._window(i, len(x))
            windows.append(window)
            cut = x[window.start : window.start + window.length]
            features.append(cut if window.length == len(x) else cut.copy())  # a view would keep all of x in memory
        lengths = torch.tensor([w.length for w in windows])
        padded = torch.zeros(len(features), int(lengths.max()), self.dataset.width)
        for row, x in zip(padded.numpy(), features, strict=True):
            row[: len(x)] = x
        return Batch(padded, lengths, self.labels[[w.recording for w in windows]])

    def windows(self, lengths: Sequence[int]) -> list[Window]:
        """The windows of the next batch, without reading features; ``lengths`` are those of all recordings."""
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
