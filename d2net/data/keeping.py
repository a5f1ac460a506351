"""Chooses where the features of a training are kept, and reads each file once on every machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2net.data.dataset import Dataset
from d2net.data.kept import KeptFeatures
from d2net.data.mapped import MappedFeatures, rows_of_machine
from d2net.data.resident import ResidentFeatures, streams_of
from d2net.data.sharded import ShardedFeatures
from d2net.distributed import ALONE, Ranks
from d2net.errors import InputError
from d2net.ops.gaps import Layout
from d2net.shares import deal

__all__ = ["keep_features"]

FRACTION = 0.25  # of a device's free memory that features may take
SAME_DATA = "names, lengths or labels differ: give all machines the same data"
HELD = 2**30  # bytes of features that are held between reading their length and keeping them


def keep_features(
    dataset: Dataset,
    device: torch.device,
    *,
    batch_size: int,
    max_snippets: int,
    layout: Layout,
    dtype: torch.dtype = torch.float32,
    budget: float = math.inf,
    graph: bool = False,
    ranks: Ranks = ALONE,
) -> KeptFeatures | None:
    """Read all features and keep them: on the device of every rank; else shared among the devices of all ranks; else
    in a file that the ranks of a machine have mapped into memory. A recording may have no label.

    Of the recordings that a machine needs each rank on it reads some, about as much as the others. Only those of which
    reading tells the length are read again where they take more than 1 GB of a rank.

    Args:
        dataset: All recordings; the same on all ranks.
        device: Of the batches.
        batch_size: Recordings of every whole batch.
        max_snippets: The most snippets of a window.
        layout: The network, as of :class:`d2net.data.batches.BatchSampler`.
        dtype: In which to keep the features.
        budget: Bytes on this rank's device; that of the rank with the least counts.
        graph: Whether a CUDA graph must hold the steps.
        ranks: As of :class:`d2net.data.batches.BatchSampler`. All of them must call this.

    Returns:
        None for one process whose device is too small.

    Raises:
        InputError: features that are missing, of another width, empty, NaN or Inf; too large for a CUDA graph; ranks
            with different data; a file that cannot be written.
        RankEnded: another rank has ended.
    """
    ranks.check_same("recordings of hash", dataset.fingerprint(), SAME_DATA)
    ranks.check_same("features in", str(dtype), "give all processes the same command")
    reading = _Reading(dataset, ranks)
    lengths, widths = reading.lengths, dataset.stream_widths
    labels = torch.from_numpy(dataset.label_matrix(allow_unlabelled=True))
    sizes: dict[str, Any] = {
        "batch_size": batch_size,
        "max_snippets": max_snippets,
        "layout": layout,
        "ranks": ranks,
    }
    mine, row = reading.shares[ranks.rank], dataset.width * dtype.itemsize
    room = -ranks.most(-int(min(budget, 2**62)))[0]
    whole = sum(lengths) * row <= room
    if graph and not whole:
        raise InputError("a CUDA graph needs resident features, which do not fit on the device; use --no-graph")
    if whole:
        read: Callable[[int], Tensor] = reading
        if ranks.local_size > 1:
            read = reading.of_machine(dtype).split(lengths).__getitem__
        kept: KeptFeatures = ResidentFeatures(
            streams_of(read, lengths, widths, dtype, device), lengths, labels, **sizes
        )
    elif ranks.size == 1:
        return None
    elif max(sum(lengths[i] for i in some) for some in reading.shares) * row <= room:
        features = torch.empty(sum(lengths[i] for i in mine), dataset.width, dtype=dtype, device=device)
        for part, i in zip(features.split([lengths[i] for i in mine]), mine, strict=True):
            part.copy_(reading(i))
        kept = ShardedFeatures(features, reading.shares, widths, lengths, labels, **sizes)
    else:
        kept = MappedFeatures(reading.of_machine(dtype), device, widths, lengths, labels, **sizes)
    ranks.wait()  # until all have them, so that what is wrong with those of one is told before the training begins
    return kept


def room_on(device: torch.device, ranks: Ranks) -> float:
    """Bytes of a GPU that the features of a rank may take, where several ranks may share it."""
    sharing = -(-ranks.local_size // torch.cuda.device_count())
    return FRACTION * torch.cuda.mem_get_info(device)[0] / sharing


class _Reading:
    """Reads features, and knows who reads which.

    Attributes:
        shares: The recordings that each rank has where they are shared, about as many snippets each.
        lengths: Snippets of every recording.
    """

    def __init__(self, dataset: Dataset, ranks: Ranks) -> None:
        self._dataset, self._ranks = dataset, ranks
        said = [r.snippets for r in dataset.recordings]
        known = [n for n in said if n is not None]
        usual = round(sum(known) / len(known)) if known else 1
        self.shares = deal([usual if n is None else n for n in said], ranks.size)
        self._held: dict[int, np.ndarray] = {}
        room = HELD
        mine = [0 if n is None else n for n in said]
        for i in self.shares[ranks.rank]:
            if said[i] is None:
                x = dataset.features(i)
                mine[i] = len(x)
                if (room := room - x.nbytes) >= 0:
                    self._held[i] = x
        self.lengths = ranks.most(*mine) if len(known) < len(said) else mine

    def __call__(self, recording: int) -> Tensor:
        """(T, all widths) float32 features."""
        x = self._held.pop(recording, None)
        if x is None:
            known = replace(self._dataset.recordings[recording], snippets=self.lengths[recording])
            x = known.features(self._dataset.width)
        return torch.from_numpy(np.require(x, requirements=["C", "W"]))

    def of_machine(self, dtype: torch.dtype) -> Tensor:
        """(all snippets, all widths), recording after recording, which the ranks of a machine share and read together.

        Raises:
            RankEnded: another rank has ended.
        """
        ranks, lengths = self._ranks, self.lengths
        features = rows_of_machine((sum(lengths), self._dataset.width), dtype, ranks)
        rows = features.split(lengths)
        first = ranks.rank - ranks.local_rank  # of this machine
        for rank, some in enumerate(self.shares):
            if (rank - first) % ranks.local_size == ranks.local_rank:
                for i in some:
                    rows[i].copy_(self(i))
        ranks.wait()
        return features
