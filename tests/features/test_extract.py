"""Features of a video: of which frames a window is, and what an extractor gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from d2net.errors import InputError
from d2net.features import extract_video
from d2net.features.extract import cropped, scaled
from d2net.features.flow import flow_function

pytest.importorskip("av", reason="PyAV is not installed: pip install 'd2net[video]'")


def brightness(windows: torch.Tensor) -> torch.Tensor:
    """Of every frame of a window, as it was before it was brought to [-1, 1]."""
    assert windows.dtype == torch.float32 and windows.shape[1] == 3 and windows.shape[3:] == (224, 224)
    return (windows.mean((1, 3, 4)) + 1) * 127.5


@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 4), (4, 10), (1, 1), (50, 50), (49, 7)])
def test_windows(make_video: Callable, greys: Callable, window: int, stride: int, batch: int) -> None:
    path = make_video("v.mkv", greys(50))
    found = extract_video(path, brightness, window=window, stride=stride, batch=batch)
    expected = [np.arange(at, at + window) for at in range(0, 50 - window + 1, stride)]
    np.testing.assert_allclose(found.values, expected, atol=1e-3)
    assert found.values.dtype == np.float32 and found.duration == pytest.approx(2.0) and found.rate == pytest.approx(25)
    assert found.notes == ()


def test_a_video_shorter_than_a_window(make_video: Callable, greys: Callable) -> None:
    found = extract_video(make_video("v.mkv", greys(5)), brightness, window=8, stride=8)
    np.testing.assert_allclose(found.values, [[0, 1, 2, 3, 4, 4, 4, 4]], atol=1e-3)
    assert found.notes == ("5 frames, less than a window of 8: the last one is repeated",)


def test_colours_and_range(make_video: Callable) -> None:
    image = np.zeros((48, 64, 3), np.uint8)
    image[..., 0], image[..., 2] = 255, 51
    found = extract_video(make_video("v.mkv", [image] * 16), lambda x: x.amax((2, 3, 4)))
    np.testing.assert_allclose(found.values, [[1, -1, 51 / 127.5 - 1]], atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 48), (256, 256), (300, 1000), (30, 31)])
def test_the_centre_of_a_frame(height: int, width: int) -> None:
    """A ramp from left to right and one from top to bottom: where a pixel of the result was."""
    rows, columns = np.linspace(0, 200, height), np.linspace(0, 200, width)
    image = np.stack(np.broadcast_arrays(rows[:, None], columns[None], 0), -1).astype(np.uint8)
    small = scaled(image)
    scale = 256 / min(height, width)
    assert small.shape == (int(height * scale), int(width * scale), 3) and min(small.shape[:2]) == 256
    middle = cropped(small)
    assert middle.shape == (224, 224, 3)
    np.testing.assert_allclose(middle[111:113, 111:113, :2].mean((0, 1)), 100, atol=2.5)  # the centre of both ramps
    spread = np.ptp(middle[..., :2].astype(float), axis=(0, 1))
    steps = [200 / (side - 1) * side / made for side, made in zip((height, width), small.shape[:2], strict=True)]
    np.testing.assert_allclose(spread, [223 * step for step in steps], atol=2.5)


def test_a_video_that_changes_its_size(tmp_path: Path, make_video: Callable, greys: Callable, monkeypatch) -> None:
    from d2net.features.video import Video

    images = [np.full((48, 64, 3), 7, np.uint8)] * 10 + [np.full((90, 60, 3), 9, np.uint8)] * 6
    monkeypatch.setattr(Video, "__iter__", lambda self: iter(images))
    found = extract_video(tmp_path / "v.mkv", brightness)
    np.testing.assert_allclose(found.values, [[7] * 10 + [9] * 6], atol=1e-3)


@pytest.mark.parametrize(
    ("extractor", "message"),
    [
        (lambda x: x.mean(), r"makes \(\) of 3 windows"),
        (lambda x: x[:1].mean((2, 3, 4)), r"makes \(1, 3\) of 3 windows; it must make \(windows, D\)"),
        (lambda x: x.mean((2, 3, 4)) / 0, "v.mkv: the extractor makes NaN or Inf"),
    ],
)
def test_extractors_that_make_something_else(make_video: Callable, greys: Callable, extractor, message: str) -> None:
    path = make_video("v.mkv", greys(50))
    with pytest.raises(InputError, match=message):
        extract_video(path, extractor)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 0}, "--fps"),
        ({"fps": float("nan")}, "--fps"),
        ({"window": 0}, "--window"),
        ({"stride": 0}, "--stride"),
        ({"batch": 0}, "--batch"),
    ],
)
def test_numbers_out_of_range(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        extract_video(tmp_path / "v.mkv", brightness, **options)


def test_an_extractor_that_fails_ends_the_reading(make_video: Callable, greys: Callable) -> None:
    import threading

    def fail(windows: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no")

    path = make_video("v.mkv", greys(200))
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="no"):
        extract_video(path, fail, window=1, stride=1, batch=1)
    assert threading.active_count() == before


def test_progress(make_video: Callable, greys: Callable) -> None:
    said: list[float] = []
    extract_video(make_video("v.mkv", greys(50)), brightness, window=5, stride=5, batch=1, progress=said.append)
    assert len(said) == 10 and said == sorted(said) and 0 < said[0] < 0.5 and said[-1] <= 1


def moving(step: int, frames: int) -> list[np.ndarray]:
    """A blotchy background that moves to the right, in pixels of a frame of 256 x 256."""
    rng = np.random.default_rng(0)
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed: pip install 'd2net[flow]'")
    blotches = cv2.GaussianBlur(rng.integers(0, 255, (256, 400, 3)).astype(np.uint8), (0, 0), 4)
    blotches = cv2.normalize(blotches, None, 0, 255, cv2.NORM_MINMAX)
    return [blotches[:, 100 - step * i : 356 - step * i] for i in range(frames)]


def test_optical_flow(make_video: Callable) -> None:
    """Motion to the right is positive, 20 pixels are 1, and a picture that stands still has none."""
    images = moving(4, 10)
    path = make_video("v.mkv", images + images[-1:] * 2)
    found = extract_video(
        path, lambda x: x.mean((2, 3, 4)),
        flow_extractor=lambda x: torch.cat([x.mean((3, 4))[:, 0], x.mean((3, 4))[:, 1]], 1),
        flow=flow_function("dis"), window=12, stride=12,
    )  # fmt: skip
    assert found.values.shape == (1, 3 + 24)
    right, down = found.values[0, 3:15], found.values[0, 15:]
    np.testing.assert_allclose(right[:9], 4 / 20, atol=0.02)
    np.testing.assert_allclose(right[9:], 0, atol=0.01)
    np.testing.assert_allclose(down, 0, atol=0.02)


def test_the_last_frame_moves_as_the_one_before(make_video: Callable) -> None:
    path = make_video("v.mkv", moving(4, 6))
    found = extract_video(
        path, lambda x: x.mean((2, 3, 4)), flow_extractor=lambda x: x.mean((3, 4))[:, 0], flow=flow_function("dis"),
        window=6, stride=6,
    )  # fmt: skip
    assert found.values[0, -1] == found.values[0, -2] > 0.15


def test_fast_motion_is_clipped() -> None:
    flow = flow_function("dis")
    first, second = moving(40, 2)
    assert 1 >= np.abs(flow(first, second)).max() > 0.9


def test_flow_of_one_frame_is_none(make_video: Callable, greys: Callable) -> None:
    pytest.importorskip("cv2", reason="OpenCV is not installed: pip install 'd2net[flow]'")
    found = extract_video(
        make_video("v.mkv", greys(1)), lambda x: x.mean((2, 3, 4)), flow_extractor=lambda x: x.abs().amax((2, 3, 4)),
        flow=flow_function("dis"),
    )  # fmt: skip
    assert (found.values[0, 3:] == 0).all()


def test_flow_that_cannot_be_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import SimpleNamespace

    with pytest.raises(InputError, match="--flow farneback: give dis or tvl1"):
        flow_function("farneback")
    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace())
    with pytest.raises(InputError, match="this OpenCV has no TV-L1; .*opencv-contrib-python-headless"):
        flow_function("tvl1")
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(InputError, match=r"pip install 'd2net\[flow\]'"):
        flow_function("dis")
