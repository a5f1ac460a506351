"""Small videos and files of sensors, made at test time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def make_video(tmp_path: Path) -> Callable[..., Path]:
    """Makes a video of (height, width, 3) uint8 frames shown at times in milliseconds; in Matroska without loss."""
    av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'd2net[video]'")

    def make(
        name: str,
        frames: Sequence[np.ndarray],
        times: Sequence[int] | None = None,
        *,
        codec: str | None = None,
        sound: float = 0.0,
        fps: int = 25,
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        times = [round(1000 * i / fps) for i in range(len(frames))] if times is None else times
        lossless = path.suffix == ".mkv"
        options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
        with av.open(str(path), "w", options=options) as container:
            audio = container.add_stream("pcm_s16le" if lossless else "aac", rate=8000) if sound else None
            stream = container.add_stream(codec or ("ffv1" if lossless else "mpeg4"), rate=fps)
            stream.height, stream.width = frames[0].shape[:2] if len(frames) else (48, 64)
            stream.pix_fmt = "bgr0" if lossless else "yuv420p"
            stream.codec_context.time_base = Fraction(1, 1000) if lossless else Fraction(1, fps)
            for i, (image, time) in enumerate(zip(frames, times, strict=True)):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                frame.pts, frame.time_base = (time, Fraction(1, 1000)) if lossless else (i, Fraction(1, fps))
                container.mux(stream.encode(frame))
            if audio is not None:
                samples = av.AudioFrame.from_ndarray(np.zeros((1, int(8000 * sound)), np.int16), "s16", "mono")
                samples.sample_rate, samples.pts = 8000, 0
                container.mux(audio.encode(samples))
                container.mux(audio.encode(None))
            container.mux(stream.encode(None))
        return path

    return make


def grey(level: int, height: int = 48, width: int = 64) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


@pytest.fixture
def greys() -> Callable[..., list[np.ndarray]]:
    """Frames of which each is as bright as its number."""
    return lambda number, height=48, width=64: [grey(i, height, width) for i in range(number)]
