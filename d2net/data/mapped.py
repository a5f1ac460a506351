"""Keeps the features of a dataset in one file on each machine, which all its ranks have mapped into memory."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from d2net.data.batches import Batch
from d2net.data.deal import Share, Window, packed_offsets
from d2net.data.kept import KeptFeatures, size_of
from d2net.distributed import ALONE, Ranks
from d2net.errors import InputError
from d2net.ops.gaps import Layout


class MappedFeatures(KeptFeatures):
    """Features of all recordings in memory of the machine that its ranks share, or on its disk; labels on the device.

    Args:
        features: (all snippets, all widths), recording after recording, such as :func:`rows_of_machine` gives.
        device: Of the batches.
        widths: Of the streams.
        lengths: Snippets of every recording.
        labels: (recordings, C) float32, multi-hot; on any device.
        batch_size: Recordings of every whole batch.
        max_snippets: The most snippets of a window.
        layout: The network, as of :class:`d2net.data.batches.BatchSampler`.
        ranks: As there.
    """

    def __init__(
        self,
        features: Tensor,
        device: torch.device,
        widths: Sequence[int],
        lengths: Sequence[int],
        labels: Tensor,
        *,
        batch_size: int,
        max_snippets: int,
        layout: Layout,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(
            lengths, labels, device, batch_size=batch_size, max_snippets=max_snippets, layout=layout, ranks=ranks
        )
        self._features, self._widths, self._dtype = features, list(widths), features.dtype
        self._begin = [0, *accumulate(self.lengths)]

    @property
    def where(self) -> str:
        """Where the features are, and how many bytes, in words."""
        return f"mapped from a file of {size_of(self._features.nbytes)} on each machine"

    def convert(self, dtype: torch.dtype) -> None:
        """Give the features in another precision from now on; the file stays as it is."""
        self._dtype = dtype

    def next(self, windows: Sequence[Window]) -> Batch:
        """The batch of these windows of the whole batch, or what this rank has of it, on the device."""
        share = Share(windows, self.ranks)
        offsets = packed_offsets([w.length for w in share.own], self.layout.reach)
        zero = offsets[-1]  # a row that is of no recording
        rows = self._rows(share, offsets, zero).to(self.labels.device, non_blocking=True)
        return self._batch(rows, zero, lambda index: self._parts(share.own, offsets, len(index)))

    def _parts(self, windows: Sequence[Window], offsets: Sequence[int], n: int) -> tuple[Tensor, ...]:
        """(n, width) of each stream, on the device; the first window begins in row ``offsets[0]``, and so on."""
        device = self.labels.device
        parts = [torch.zeros(n, width, dtype=self._dtype, pin_memory=device.type == "cuda") for width in self._widths]
        for window, offset in zip(windows, offsets, strict=False):
            begin = self._begin[window.recording] + window.start
            x = self._features[begin : begin + window.length].split(self._widths, 1)
            for part, columns in zip(parts, x, strict=True):
                part[offset : offset + window.length] = columns
        return tuple(part.to(device, non_blocking=True) for part in parts)


def rows_of_machine(shape: tuple[int, int], dtype: torch.dtype, ranks: Ranks) -> Tensor:
    """A matrix that the ranks of each machine share: what one writes, the others see after :meth:`Ranks.wait`.

    It is a file in the folder for temporary files, which loses its name while it is empty: its space is free again when
    all of them have dropped it or have ended, however they end.

    Args:
        shape: Of the matrix; no number is 0.
        dtype: Of its elements.
        ranks: All of them must call this.

    Raises:
        InputError: the file cannot be made, as on a full disk.
        RankEnded: another rank has ended.
    """
    size = shape[0] * shape[1] * dtype.itemsize
    path, handles = b"", []
    try:
        if ranks.local_rank == 0:
            handle, name = tempfile.mkstemp(prefix="d2net-")
            handles.append(handle)
            path = os.fsencode(name)
        of_machine = ranks.from_each(path)[ranks.rank - ranks.local_rank]
        if ranks.local_rank:
            handles.append(os.open(of_machine, os.O_RDWR))
        ranks.wait()  # until all have opened it
        if ranks.local_rank == 0:
            os.unlink(path)
            path = b""
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handles[0], 0, size)  # to write to a full disk through memory would kill the process
            else:  # on macOS, which has no such call
                os.ftruncate(handles[0], size)
        ranks.wait()
        memory = mmap.mmap(handles[0], size)
    except OSError as error:
        raise InputError(
            f"{tempfile.gettempdir()}: the {size_of(size)} of the features cannot be written there, once on each "
            f"machine ({error.strerror or error}); make space, or set TMPDIR to a folder with more"
        ) from error
    finally:
        for handle in handles:
            os.close(handle)
        if path:
            Path(os.fsdecode(path)).unlink(missing_ok=True)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
