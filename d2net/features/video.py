"""Frames of a video, upright and at a steady rate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from d2net.errors import InputError
from d2net.reading import check_ordinary
from d2net.words import counted, reason

__all__ = ["SUFFIXES", "Video"]

SUFFIXES = frozenset(
    ".3gp .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .vob .webm .wmv".split()
)  # of files in folders; one that is named itself may have any
LONGEST_GAP = 600.0  # seconds without a frame, after which a time is taken for damage
_MOST_DAMAGED = 1000  # packets in which nothing is found, after which nothing more is looked for
_SAID_GAP = 1.0  # seconds without a frame that are worth a note


class Video:
    """The frames of a video file, (height, width, 3) uint8 RGB each: iterate over it, once.

    Time begins where the file's does: a picture that comes later, after the sound, is shown from the beginning. Where a
    rate is asked for, frame i is what is on the screen at i / fps seconds (rounded as ffmpeg's filter ``fps`` does), so
    that frames are repeated or left out, and a varying rate becomes a steady one. What cannot be decoded is left out.

    Args:
        path: Of the file, in whatever format ffmpeg reads.
        fps: Frames a second; None: the frames that there are.

    Attributes:
        announced: Seconds that the file says it lasts; None where it does not.
        seconds: That the frames so far last; at the end, all of them.
        decoded: Frames that were decoded so far.
        notes: What was left out, repeated or damaged; complete at the end.

    Raises:
        InputError: missing, no video, or nothing that can be decoded.
    """

    def __init__(self, path: Path, fps: float | None = None) -> None:
        self.path, self.fps = path, fps
        self.announced: float | None = None
        self.seconds, self.decoded = 0.0, 0
        self.notes: list[str] = []
        self._damaged = 0  # packets that cannot be decoded

    def __iter__(self) -> Iterator[np.ndarray]:
        with _opened(self.path) as container:
            stream = _pictures(container, self.path)
            stream.thread_type = "AUTO"
            start = max(0, container.start_time or 0) / 1_000_000
            if stream.duration:
                self.announced = float((stream.start_time or 0) + stream.duration) * float(stream.time_base) - start
            elif container.duration:
                self.announced = container.duration / 1_000_000
            usual = 1 / float(stream.average_rate or stream.guessed_rate or 25)  # seconds of a frame
            usual = usual if usual < LONGEST_GAP else 1 / 25
            for frame, times in self._shown(self._decoded(container, stream), start, usual):
                if times:
                    image = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
                    for _ in range(times):
                        yield image
            expected = self.announced or 0.0
            missing = stream.frames - self.decoded - self._damaged
            if self.seconds < min(0.95 * expected, expected - 1) or missing > max(0.05 * stream.frames, 1):
                of = f" of {stream.frames}" if stream.frames else ""
                self.notes.append(
                    f"cut short: {self.decoded}{of} frames, {self.seconds:.1f} of {expected:.1f} s; what is there is "
                    "used"
                )

    def _shown(self, frames: Iterator[Any], start: float, usual: float) -> Iterator[tuple[Any, int]]:
        """The frames, and how many times each is given."""
        before, time, given, untimed, gap = None, 0.0, 0, 0, (0.0, 0.0)
        for frame in frames:
            if self.fps is None:
                self.seconds = self.decoded * usual
                yield frame, 1
                continue
            if before is None and frame.time is not None:
                start = min(start, frame.time)
            now = -1.0 if frame.time is None else frame.time - start
            if not 0 <= now - time < LONGEST_GAP:
                untimed += 1
                continue
            gap = max(gap, (now - time, time))
            due = max(round(now * self.fps), given)
            yield frame if before is None else before, due - given  # before the first one it is seen already
            given, before, time = due, frame, now
            length = float(frame.duration * frame.time_base) if frame.duration else usual
            self.seconds = now + (length if 0 < length < LONGEST_GAP else usual)
        if self.fps is not None:
            if before is None:
                raise InputError(f"{self.path}: no frame has a time that can be; convert it, as ffmpeg -i does")
            yield before, max(round(self.seconds * self.fps) - given, given == 0)
        if untimed:
            self.notes.append(f"{counted(untimed, 'frame')} without a time that can be left out")
        if gap[0] > max(_SAID_GAP, 3 * usual):
            self.notes.append(f"no frame for {gap[0]:.1f} s from second {gap[1]:.1f} on: the one before is repeated")

    def _decoded(self, container: Any, stream: Any) -> Iterator[Any]:
        """The frames that can be decoded, up to the end, or to where the file is damaged."""
        import av

        corrupt, why = 0, ""
        packets = container.demux(stream)
        while self._damaged <= _MOST_DAMAGED:
            frames: list[Any] = []
            try:
                packet = next(packets, None)
                if packet is None:
                    break
                frames = packet.decode()
            except (av.error.FFmpegError, MemoryError, ValueError) as error:
                self._damaged, why = self._damaged + 1, why or _why(error)
            for frame in frames:
                self.decoded += 1
                corrupt += bool(frame.is_corrupt)
                yield frame
        if self.decoded == 0:
            said = f"no frame of it can be decoded ({why})" if why else "holds no frame"
            raise InputError(f"{self.path}: {said}; copy or convert it again, as ffmpeg -i does")
        if self._damaged or corrupt:
            self.notes.append(
                f"damaged: {counted(self._damaged, 'packet')} cannot be decoded, {counted(corrupt, 'frame')} only in "
                f"part{f' ({why})' if why else ''}; {counted(self.decoded, 'frame')} are used"
            )


def check_installed() -> None:
    """Raises InputError where PyAV is not."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise InputError("videos are read by PyAV, which is not installed; run: pip install 'd2net[video]'") from error


def _opened(path: Path) -> Any:
    check_installed()
    import av

    check_ordinary(path)
    if path.stat().st_size == 0:
        raise InputError(f"{path}: is empty; copy it again")
    try:
        return av.open(str(path))
    except (av.error.FFmpegError, ValueError) as error:
        raise InputError(f"{path}: no video that can be read ({_why(error)}); copy or convert it again") from error


def _why(error: BaseException) -> str:
    return getattr(error, "strerror", None) or reason(error)


def _pictures(container: Any, path: Path) -> Any:
    import av

    # A picture beside music (a cover) is a stream of one frame.
    cover = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & cover]
    if not streams:
        kinds = ", ".join(dict.fromkeys(s.type for s in container.streams)) or "nothing"
        raise InputError(f"{path}: has no pictures, only {kinds}; give a video")
    if streams[0].codec_context is None:  # decoding it would end the process in some versions of PyAV
        raise InputError(f"{path}: is coded in a way that FFmpeg cannot decode here; convert it to H.264")
    return streams[0]
