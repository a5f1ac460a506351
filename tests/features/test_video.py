"""Frames of videos: the right one at each time, upright; what cannot be read is named, what is left out is counted."""

from __future__ import annotations

import wave
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from d2net.errors import InputError
from d2net.features.video import Video

pytest.importorskip("av", reason="PyAV is not installed: pip install 'd2net[video]'")


def levels(video: Video) -> list[int]:
    images = list(video)
    assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image in images)
    return [int(image[10, 10, 0]) for image in images]


def on_screen(times: list[float], end: float, fps: float) -> list[int]:
    """Which frame is shown at i / fps: the last whose time, rounded to a multiple of 1 / fps, has come."""
    starts = [round(t * fps) for t in times]
    return [max(k for k, s in enumerate(starts) if s <= i or k == 0) for i in range(round(end * fps))]


def test_the_frames_that_there_are(make_video: Callable, greys: Callable) -> None:
    video = Video(make_video("v.mkv", greys(30)))
    assert levels(video) == list(range(30))
    assert video.decoded == 30 and video.seconds == pytest.approx(1.2) and not video.notes


@pytest.mark.parametrize("fps", [25, 10, 7.5, 60, 1])
@pytest.mark.parametrize("rate", [10, 25, 30])
def test_frames_are_repeated_or_left_out(make_video: Callable, greys: Callable, rate: int, fps: float) -> None:
    number = 2 * rate
    video = Video(make_video("v.mkv", greys(number), fps=rate), fps)
    times = [round(1000 * i / rate) / 1000 for i in range(number)]
    assert levels(video) == on_screen(times, 2.0, fps)
    assert video.seconds == pytest.approx(2.0, abs=0.01) and not video.notes


def test_a_varying_rate(make_video: Callable, greys: Callable) -> None:
    times = [0, 40, 80, 2000, 2030, 2060, 2500]
    video = Video(make_video("v.mkv", greys(7), times), 25)
    assert levels(video) == on_screen([t / 1000 for t in times], 2.54, 25)
    assert video.notes == ["no frame for 1.9 s from second 0.1 on: the one before is repeated"]


@pytest.mark.parametrize("frames", [0, 1])
def test_one_frame_or_none(make_video: Callable, greys: Callable, frames: int) -> None:
    path = make_video("v.mkv", greys(frames), sound=0.0 if frames else 1.0)
    if frames:
        assert levels(Video(path, 25)) == [0]
        assert levels(Video(path, 0.1)) == [0]
    else:
        with pytest.raises(InputError, match=rf"{path}: holds no frame; copy or convert it again"):
            list(Video(path, 25))


def test_pictures_that_begin_after_the_sound(make_video: Callable, greys: Callable) -> None:
    """Time is the player's, which begins with the sound."""
    times = [1000 + 40 * i for i in range(10)]
    video = Video(make_video("v.mkv", greys(10), times, sound=3.0), 25)
    assert levels(video) == [0] * 25 + list(range(10))
    assert video.seconds == pytest.approx(1.4)


def test_a_file_that_does_not_begin_at_zero(make_video: Callable, greys: Callable) -> None:
    video = Video(make_video("v.mkv", greys(10), [5000 + 40 * i for i in range(10)]), 25)
    assert levels(video) == list(range(10)) and video.seconds == pytest.approx(0.4)


# {a b u, c d v, x y w} of ISO 14496-12: a point (p, q) of the picture is shown at (a p + c q, b p + d q).
MATRICES = {"as it is": (1, 0, 0, 1), "90 clockwise": (0, 1, -1, 0), "180": (-1, 0, 0, -1), "270": (0, -1, 1, 0)}
SHOWN = {
    "as it is": ((0, 0), (48, 64)),
    "90 clockwise": ((0, 1), (64, 48)),
    "180": ((1, 1), (48, 64)),
    "270": ((1, 0), (64, 48)),
}


@pytest.mark.parametrize("turn", MATRICES)
def test_a_telephone_that_was_held_upright(make_video: Callable, turn: str) -> None:
    """The corner that is bright in the file's upper left is shown where the matrix puts it."""
    image = np.zeros((48, 64, 3), np.uint8)
    image[:16, :16] = 255
    path = make_video("v.mp4", [image] * 5)
    content = bytearray(path.read_bytes())
    header = content.index(b"tkhd")
    at = header + 4 + 40  # version 0: 40 bytes before the matrix
    a, b, c, d = (value * 65536 & 0xFFFFFFFF for value in MATRICES[turn])
    for k, value in enumerate((a, b, 0, c, d, 0)):
        content[at + 4 * k : at + 4 * k + 4] = value.to_bytes(4, "big")
    path.write_bytes(content)
    (bottom, right), shape = SHOWN[turn]
    for shown in Video(path, 25):
        assert shown.shape == (*shape, 3)
        corners = shown[4 :: shape[0] - 9, 4 :: shape[1] - 9, 0] > 128
        assert corners.tolist() == [[(r, c) == (bottom, right) for c in (0, 1)] for r in (0, 1)]


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.avi"])
def test_a_video_that_was_cut_short(make_video: Callable, name: str) -> None:
    """Its index, which says how long it was, is at the beginning, as on the web."""
    rng = np.random.default_rng(0)
    path = make_video(name, [rng.integers(0, 255, (48, 64, 3), np.uint8) for _ in range(100)])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    video = Video(path, 25)
    frames = len(list(video))
    assert 30 < video.decoded < 60 and abs(frames - video.decoded) <= 1
    short = [note for note in video.notes if note.startswith(f"cut short: {video.decoded} ")]
    assert len(short) == 1 and short[0].endswith(" s; what is there is used")
    assert f"of {'4.0 s' if name == 'v.mkv' else '100 frames'}" in short[0]


def test_a_video_with_a_damaged_middle(make_video: Callable, greys: Callable) -> None:
    path = make_video("v.mkv", greys(60))
    content = bytearray(path.read_bytes())
    for i in range(len(content) // 2, len(content) // 2 + 200):
        content[i] ^= 0x5A
    path.write_bytes(content)
    video = Video(path, 25)
    images = list(video)
    assert 0 < len(images) and video.decoded < 60
    assert any(f"{video.decoded} frames" in note for note in video.notes), video.notes


def test_frames_without_a_time_are_counted(
    make_video: Callable, greys: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_video("v.mkv", greys(3))
    times = [None, 0.0, 0.04, 0.02, 1e6, 0.08]

    def decoded(self: Video, container: object, stream: object):
        for i, time in enumerate(times):
            yield SimpleNamespace(
                time=time, duration=None, rotation=0, to_ndarray=lambda format, i=i: np.full((48, 64, 3), i, np.uint8)
            )

    monkeypatch.setattr(Video, "_decoded", decoded)
    video = Video(path, 25)
    assert levels(video) == [1, 2, 5]
    assert video.notes[0] == "3 frames without a time that can be left out"
    times[:] = [None, None]
    with pytest.raises(InputError, match="no frame has a time that can be"):
        list(Video(path, 25))


def test_a_frame_that_would_last_for_ages(
    make_video: Callable, greys: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a damaged time base has it: it is not repeated to the end of time."""
    path = make_video("v.mkv", greys(3))
    frame = SimpleNamespace(
        time=0.0, duration=1, time_base=1e9, rotation=0, to_ndarray=lambda format: np.zeros((48, 64, 3), np.uint8)
    )
    monkeypatch.setattr(Video, "_decoded", lambda self, container, stream: iter([frame]))
    video = Video(path, 25)
    assert len(list(video)) == 1 and video.seconds == pytest.approx(0.04)


def sound_alone(path: Path) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(8000))


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("sound.mp4", sound_alone, "has no pictures, only audio; give a video"),
        ("empty.mp4", Path.touch, "is empty; copy it again"),
        ("none.mp4", lambda path: None, "No such file"),
        ("text.mp4", lambda path: path.write_text("a,b\n1,2\n" * 99), "no video that can be read"),
        ("folder.mp4", Path.mkdir, "Is a directory"),
        ("noise.mp4", lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), "no video that can be read"),
    ],
)
def test_files_that_are_no_videos(tmp_path: Path, name: str, make: Callable, message: str) -> None:
    path = tmp_path / name
    make(path)
    with pytest.raises(InputError, match=message) as error:
        list(Video(path, 25))
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_an_unknown_codec(make_video: Callable, greys: Callable) -> None:
    path = make_video("v.mp4", greys(10), codec="libx264")
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    with pytest.raises(InputError, match="is coded in a way that FFmpeg cannot decode here; convert it to H.264"):
        list(Video(path, 25))


def test_an_mp4_without_its_index(make_video: Callable, greys: Callable) -> None:
    path = make_video("v.mp4", greys(50))
    path.write_bytes(path.read_bytes()[: path.read_bytes().index(b"moov") - 4])
    with pytest.raises(InputError, match="no video that can be read"):
        list(Video(path, 25))


def test_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(InputError, match=r"PyAV, which is not installed; run: pip install 'd2net\[video\]'"):
        list(Video(tmp_path / "v.mp4"))
