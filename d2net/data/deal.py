"""Which recordings of a batch each rank computes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from d2net.distributed import Ranks


class Window(NamedTuple):
    """Snippets ``start`` to ``start + length`` of the recording with index ``recording``."""

    recording: int
    start: int
    length: int


def deal(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Divide recordings among ``size`` ranks: as many for each, up to one, and about as many snippets.

    The longest first, each to the rank with the fewest snippets of those that may have more. The first ranks have one
    more where they do not come out even, so every rank has the same number in every batch.

    Returns:
        For each rank the numbers of its recordings, rising.
    """
    if size == 1:
        return [list(range(len(lengths)))]
    free = [len(lengths) // size + (rank < len(lengths) % size) for rank in range(size)]
    load = [0] * size
    found: list[list[int]] = [[] for _ in range(size)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = min((r for r in range(size) if free[r]), key=lambda r: (load[r], r))
        found[rank].append(i)
        load[rank] += lengths[i]
        free[rank] -= 1
    return [sorted(some) for some in found]


class Share:
    """The windows of a batch, and which of them this rank has.

    Args:
        windows: Of the whole batch.
        ranks: Among which it is dealt.

    Attributes:
        whole: All windows.
        own: Those of this rank.
        most: Recordings of a rank, at most.
        places: Of each recording of the batch, as :class:`d2net.losses.WholeBatch` has it.
        max_length: The longest recording of the batch.
    """

    def __init__(self, windows: Sequence[Window], ranks: Ranks) -> None:
        dealt = deal([w.length for w in windows], ranks.size)
        self.whole = list(windows)
        self._mine = dealt[ranks.rank]
        self.own = [self.whole[i] for i in self._mine]
        self.most = -(-len(self.whole) // ranks.size)
        self.places = [0] * len(self.whole)
        for rank, some in enumerate(dealt):
            for n, i in enumerate(some):
                self.places[i] = rank * self.most + n
        self.max_length = max(w.length for w in windows)

    def row_numbers(self, n: int, gap: int) -> np.ndarray:
        """(n,) int64: of each of this rank's packed rows its number among those of the whole batch; 0 in gaps."""
        numbers = np.zeros(n, np.int64)
        begins = packed_offsets([w.length for w in self.whole], gap)
        for i, first in zip(self._mine, packed_offsets([w.length for w in self.own], gap), strict=False):
            numbers[first : first + self.whole[i].length] = np.arange(begins[i], begins[i] + self.whole[i].length)
        return numbers


def packed_offsets(lengths: Sequence[int], gap: int) -> list[int]:
    """B+1 numbers: where each recording begins, with ``gap`` rows before and behind it; where the last gap ends."""
    return list(accumulate((length + gap for length in lengths), initial=gap))
