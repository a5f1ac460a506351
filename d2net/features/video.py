"""Frames of a video, at a steady rate and of one size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from d2net.errors import InputError
from d2net.features.i3d import SIZE

SHORTER_SIDE = 256  # pixels, before the centre is cut out
MOST_FRAMES_APART = 3600  # seconds without a frame, after which a time is taken for damage


@dataclass(frozen=True)
class Video:
    """What a video file says of itself.

    Attributes:
        path: Of the file.
        fps: Frames a second, on the average.
        seconds: How long it is; None where the file does not say.
        width: Pixels, as shown.
        height: Pixels, as shown.
    """

    path: Path
    fps: float
    seconds: float | None
    width: int
    height: int


def probe(path: Path) -> Video:
    """What a video file says of itself.

    Raises:
        InputError: missing, no video, or nothing that can be decoded.
    """
    with _opened(path) as container:
        stream = _video_stream(container, path)
        rate = stream.average_rate or stream.guessed_rate
        if not rate:
            raise InputError(f"{path}: does not say how many frames a second it has; convert it, as ffmpeg -i does")
        seconds = stream.duration * stream.time_base if stream.duration else None
        if seconds is None and container.duration:
            seconds = container.duration / 1_000_000
        turned = _turns(next(_decoded(container, stream, path))) % 2
        width, height = stream.width, stream.height
        return Video(
            path, float(rate), float(seconds) if seconds else None, *((height, width) if turned else (width, height))
        )


def frames(path: Path, fps: float | None = None) -> Iterator[np.ndarray]:
    """The frames of a video, upright.

    Args:
        path: Of the file, in whatever format ffmpeg reads.
        fps: Frames a second: each frame is shown until the next begins, so that frames are repeated or left out, and a
            varying rate becomes a steady one. None: the frames that there are.

    Yields:
        (height, width, 3) uint8 RGB.

    Raises:
        InputError: missing, no video, or nothing that can be decoded. A file that ends early ends the frames.
    """
    with _opened(path) as container:
        stream = _video_stream(container, path)
        stream.thread_type = "AUTO"
        shown, number = None, 0  # the frame that is on the screen; how many have been given
        start = last = None
        for frame in _decoded(container, stream, path):
            image = np.rot90(frame.to_ndarray(format="rgb24"), _turns(frame))
            if fps is None:
                yield image
                continue
            time = frame.time
            if start is None:
                start = time or 0.0
            if time is None or (last is not None and not 0 <= time - last < MOST_FRAMES_APART):
                continue  # no time, or one that cannot be
            due = round((time - start) * fps)
            while shown is not None and number < due:
                yield shown
                number += 1
            shown, last = image, time
        if shown is not None:
            yield shown


def cropped(images: np.ndarray) -> Tensor:
    """Frames as I3D sees them: the shorter side 256 pixels long, the central 224 x 224 of that, in [-1, 1].

    Args:
        images: (T, height, width, 3) uint8.

    Returns:
        (3, T, 224, 224) float32.
    """
    height, width = images.shape[1:3]
    scale = SHORTER_SIDE / min(height, width)
    size = (SHORTER_SIDE, int(width * scale)) if height <= width else (int(height * scale), SHORTER_SIDE)
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)  # channels last in memory
    x = functional.interpolate(x, size, mode="bilinear", align_corners=False)
    top, left = (size[0] - SIZE) // 2, (size[1] - SIZE) // 2
    return x[:, :, top : top + SIZE, left : left + SIZE].permute(1, 0, 2, 3).float() / 127.5 - 1


def _opened(path: Path) -> Any:
    try:
        import av
    except ImportError as error:
        raise InputError("videos are read by PyAV, which is not installed; run: pip install 'd2net[video]'") from error
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; correct the path")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: is empty; copy it again")
    try:
        return av.open(str(path))
    except av.error.FFmpegError as error:
        raise InputError(
            f"{path}: no video that can be read ({error.strerror}); convert it, as ffmpeg -i does"
        ) from error


def _video_stream(container: Any, path: Path) -> Any:
    # A picture beside music (a cover) is a stream of one frame.
    streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
    if not streams:
        raise InputError(f"{path}: has no pictures, only {', '.join(s.type for s in container.streams) or 'nothing'}")
    return streams[0]


def _decoded(container: Any, stream: Any, path: Path) -> Iterator[Any]:
    """The frames up to the end, or to where the file is damaged."""
    import av

    found = 0
    try:
        for frame in container.decode(stream):
            found += 1
            yield frame
    except (av.error.FFmpegError, MemoryError) as error:
        if found == 0:
            raise InputError(f"{path}: no frame can be decoded ({error}); copy or convert it again") from error
        import warnings

        warnings.warn(f"{path}: damaged after {found} frames; what comes before is used", stacklevel=2)
    if found == 0:
        raise InputError(f"{path}: holds no frame; copy it again")


def _turns(frame: Any) -> int:
    """Quarter turns counterclockwise that bring a frame upright."""
    return round(frame.rotation / 90) % 4
