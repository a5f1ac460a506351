"""Simple statistics of the windows of a sensor: the features of signals."""

from __future__ import annotations

import numpy as np

BANDS = ((1.0, 3.0), (3.0, 6.0), (6.0, 13.0))  # Hz, [low, high)
WIDTH = 9 + len(BANDS)  # statistics of a channel


def window_statistics(signal: np.ndarray, *, rate: float, window: int, stride: int) -> np.ndarray:
    """Simple statistics of the windows of one sensor.

    Args:
        signal: (n, axes), steadily sampled; n at least :func:`shortest` of window and stride.
        rate: Samples a second.
        window: Samples that a snippet looks at; at least ``stride``.
        stride: Samples from one snippet to the next.

    Returns:
        (n // stride, 12 * channels) float32, of as many channels as axes and, where these are several, their
        magnitude. Per channel: mean, standard deviation, minimum, lower quartile, median, upper quartile, maximum, mean
        absolute difference of neighbours, rate of crossings of the mean, and the log energy of :data:`BANDS`. Window t
        is centred on samples [stride t, stride (t + 1)); the signal is mirrored at both ends.
    """
    channels = signal
    if signal.shape[1] > 1:
        channels = np.concatenate([signal, np.linalg.norm(signal, axis=1, keepdims=True)], axis=1)
    before, after = _padding(window, stride)
    padded = np.pad(channels.astype(np.float32), ((before, after), (0, 0)), mode="reflect")
    # (n // stride, channels, window), a view
    windows = np.lib.stride_tricks.sliding_window_view(padded, window, axis=0)[::stride]
    ordered = np.sort(windows, axis=-1)
    mean = windows.mean(axis=-1, keepdims=True)
    centred = windows - mean
    energy = np.square(np.abs(np.fft.rfft(centred, axis=-1)))
    above = centred > 0
    bins = [tuple(round(hertz * window / rate) for hertz in band) for band in BANDS]
    statistics = [
        mean[..., 0],
        np.sqrt(np.square(centred).mean(axis=-1)),
        *(ordered[..., i] for i in (0, window // 4, window // 2, 3 * window // 4, window - 1)),
        np.abs(np.diff(windows, axis=-1)).mean(axis=-1),
        (above[..., 1:] != above[..., :-1]).mean(axis=-1),
        # 1e-3 keeps the logarithm of a resting sensor finite
        *(np.log(energy[..., low:high].sum(axis=-1) + 1e-3) for low, high in bins),
    ]
    return np.concatenate(statistics, axis=1).astype(np.float32)


def shortest(window: int, stride: int) -> int:
    """Samples that give a snippet, and that :func:`window_statistics` can mirror."""
    return max(stride, _padding(window, stride)[1] + 1)


def _padding(window: int, stride: int) -> tuple[int, int]:
    """Samples before and after the signal that centre the windows."""
    before = (window - stride) // 2
    return before, window - stride - before
