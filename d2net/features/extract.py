"""Features of one recording: what a network, or any function of frames, says of its windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from d2net.errors import InputError
from d2net.features.i3d import SIZE
from d2net.features.video import Video
from d2net.words import counted

SHORTER_SIDE = 256  # pixels, before the centre is cut out
Extractor = Callable[[Tensor], Tensor]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Features:
    """Of one recording.

    Attributes:
        values: (T, D) float32.
        duration: Seconds of the recording that could be read.
        rate: Frames or rows a second that the file itself has.
        notes: What was left out, repeated or taken for granted, a sentence each.
    """

    values: np.ndarray
    duration: float
    rate: float
    notes: tuple[str, ...] = ()


def extract_video(
    path: Path,
    extractor: Extractor,
    *,
    flow_extractor: Extractor | None = None,
    flow: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    fps: float = 25.0,
    window: int = 16,
    stride: int = 16,
    batch: int = 4,
    device: str = "cpu",
    progress: Callable[[float], None] | None = None,
) -> Features:
    """Features of the windows of a video.

    Window t is frames [stride t, stride t + window) at ``fps`` frames a second; what is left at the end, less than a
    window, has none. Of a video that is shorter than a window the last frame is repeated. Frames are read in a thread
    beside the computing.

    Args:
        path: Of the video.
        extractor: A function of (N, 3, window, 224, 224) float32 in [-1, 1], RGB, on ``device``, to (N, D): of each
            frame, made 256 pixels long at its shorter side, the central 224 x 224 pixels.
        flow_extractor: The same of (N, 2, window, 224, 224), the motion from each frame to the next; its D' numbers
            come after the D.
        flow: Computes that motion (:func:`d2net.features.flow.flow_function`); given where ``flow_extractor`` is.
        fps: Frames a second.
        window: Frames of a window.
        stride: Frames from one window to the next.
        batch: N, windows that are computed at a time.
        device: Where.
        progress: Called with the share of the video that is done.

    Raises:
        InputError: no video that can be read, or a number out of range.
    """
    check_sampling(fps, window, stride)
    if batch < 1:
        raise InputError(f"batch (--batch) is {batch}; it must be at least 1")
    video = Video(path, fps)
    frames = _prepared(video, flow if flow_extractor is not None else None)
    batches = _batches(_windows(frames, window, stride, video.notes), batch)
    values = []
    with closing(_ahead(batches)) as ready, torch.inference_mode():
        for rgb, motion in ready:
            x = torch.from_numpy(rgb).to(device).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1)
            found = _checked(extractor(x), path, len(rgb))
            if flow_extractor is not None:
                x = torch.from_numpy(motion).to(device).permute(0, 4, 1, 2, 3)
                found = np.concatenate([found, _checked(flow_extractor(x), path, len(rgb))], axis=1)
            values.append(found)
            if progress is not None and video.announced:
                progress(min(1.0, video.seconds / video.announced))
    notes = tuple(video.notes)
    return Features(np.concatenate(values), video.seconds, video.decoded / max(video.seconds, 1e-9), notes)


def check_sampling(fps: float, window: int, stride: int) -> None:
    """Raises InputError for numbers of which no windows can be made."""
    if not 0 < fps <= 10_000 or not math.isfinite(fps):
        raise InputError(f"fps (--fps) is {fps:g}; it must be a number above 0, at most 10000")
    for name, value in (("window", window), ("stride", stride)):
        if not 1 <= value <= 100_000:
            raise InputError(f"{name} (--{name}) is {value}; it must be from 1 to 100000")


def scaled(image: np.ndarray) -> np.ndarray:
    """A (height, width, 3) uint8 frame with its shorter side 256 pixels long."""
    height, width = image.shape[:2]
    scale = SHORTER_SIDE / min(height, width)
    size = (SHORTER_SIDE, int(width * scale)) if height <= width else (int(height * scale), SHORTER_SIDE)
    x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]  # channels last in memory
    x = functional.interpolate(x, size, mode="bilinear", align_corners=False)
    return x[0].permute(1, 2, 0).contiguous().numpy()


def cropped(image: np.ndarray) -> np.ndarray:
    """The central 224 x 224 of a frame."""
    top, left = ((side - SIZE) // 2 for side in image.shape[:2])
    return image[top : top + SIZE, left : left + SIZE]


_Frame = tuple[np.ndarray, "np.ndarray | None"]  # (224, 224, 3) uint8 and (224, 224, 2) float32


def _prepared(
    images: Iterable[np.ndarray], flow: Callable[[np.ndarray, np.ndarray], np.ndarray] | None
) -> Iterator[_Frame]:
    """Each frame, cropped, and the motion to the next one; after the last frame things move on as before."""
    source = before = motion = None
    for image in images:
        frame = before if image is source and before is not None else scaled(image)
        if flow is None:
            yield cropped(frame), None
        elif before is not None:
            motion = np.zeros((SIZE, SIZE, 2), np.float32)
            if frame.shape != before.shape:  # the picture changes its shape within the video: no motion is known
                pass
            elif frame is not before:
                motion = cropped(flow(before, frame))
            yield cropped(before), motion
        source, before = image, frame
    if flow is not None and before is not None:
        yield cropped(before), np.zeros((SIZE, SIZE, 2), np.float32) if motion is None else motion


def _windows(frames: Iterable[_T], window: int, stride: int, notes: list[str]) -> Iterator[list[_T]]:
    buffer: list[_T] = []
    number, given = 0, False
    for frame in frames:
        if number >= 0:
            buffer.append(frame)
        number += 1
        if len(buffer) == window:
            given = True
            yield buffer[:]
            number = min(0, window - stride)  # negative: frames between this window and the next
            del buffer[:stride]
    if not given and buffer:
        notes.append(f"{counted(len(buffer), 'frame')}, less than a window of {window}: the last one is repeated")
        yield buffer + buffer[-1:] * (window - len(buffer))


def _batches(windows: Iterator[list[_Frame]], size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(N, window, 224, 224, 3) uint8 and (N, window, 224, 224, 2) float32, or nothing in it."""
    while several := list(islice(windows, size)):
        rgb = np.stack([np.stack([frame for frame, _ in window]) for window in several])
        motion = [np.stack([m for _, m in window if m is not None] or [np.empty(0)]) for window in several]
        yield rgb, np.stack(motion)


def _ahead(items: Iterator[_T]) -> Generator[_T, None, None]:
    """The same items, of which the next is made in a thread while one is worked on."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, items, None)
            yield item


def _checked(values: Tensor, path: Path, windows: int) -> np.ndarray:
    found = values.detach().float().cpu().numpy()
    if found.ndim != 2 or len(found) != windows:
        raise InputError(f"the extractor makes {found.shape} of {windows} windows; it must make (windows, D)")
    if not np.isfinite(found).all():
        raise InputError(f"{path}: the extractor makes NaN or Inf of it; use other weights, or --precision float32")
    return found
