"""Mean and standard deviation of every feature over the snippets of a dataset."""

from __future__ import annotations

import numpy as np

from d2net.data.dataset import Dataset

__all__ = ["moments"]


def moments(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """(W,) float64 mean and standard deviation of every column, over all snippets of all recordings.

    Reads every recording once. Where a column does not vary, but for the rounding of float32, its deviation is 1.

    Raises:
        InputError: features that are missing, of another width, empty, NaN or Inf.
    """
    count, mean = 0, np.zeros(dataset.width)
    squares = np.zeros(dataset.width)  # sum of squared distances from the mean
    for i in range(len(dataset)):
        x = dataset.features(i).astype(np.float64)
        own = x.mean(axis=0)
        off = own - mean
        total = count + len(x)
        # Of two groups joined (Chan et al., 1979): nothing large is subtracted from something large.
        squares += np.square(x - own).sum(axis=0) + off**2 * (count * len(x) / total)
        mean += off * (len(x) / total)
        count = total
    deviation = np.sqrt(squares / max(count, 1))
    return mean, np.where(deviation > 1e-6 * np.abs(mean) + 1e-30, deviation, 1.0)
