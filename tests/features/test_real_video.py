"""From a real video to what the published network says of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

from d2net.cli import app
from d2net.errors import InputError
from d2net.features import I3D, extract_video, load_i3d

pytest.importorskip("av", reason="PyAV is not installed: pip install 'd2net[video]'")


@pytest.fixture
def video(shared: Path) -> Path:
    path = shared / "data" / "video" / "v_GGSY1Qvo990.mp4"
    if not path.is_file():
        pytest.skip(f"no file {path}")
    try:
        load_i3d()
    except InputError as error:
        pytest.skip(str(error))
    return path


def test_what_happens_in_a_video(video: Path, tmp_path: Path) -> None:
    """Every sixth window of 16 frames, of which the fourth shows the action."""
    arguments = ["features", str(video), "--out", str(tmp_path), "--extractor", "kinetics400", "--stride", "96"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    scores = np.load(tmp_path / f"{video.stem}.npy")
    said = json.loads((tmp_path / "features.json").read_text())
    assert said["recordings"][video.stem]["duration"] == pytest.approx(18.09, abs=0.01)
    best = [said["classes"][k] for k in scores.argmax(1)]
    assert len(best) == 5 and set(best) <= {"clean and jerk", "deadlifting", "snatch weight lifting"}
    assert best[3] == "clean and jerk" and scores[3].max() > 0.9


@pytest.mark.slow
def test_every_window_has_the_published_class(video: Path, shared: Path) -> None:
    """Logits differ by up to 0.23, for its frames were decoded and resized by others; of near ties that decides."""
    oracle = np.load(shared / "oracles" / "i3d_rgb.npz")["v_GGSY1Qvo990_logits"]
    network = load_i3d()
    found = extract_video(video, lambda frames: network(frames).logits, fps=19.62).values
    assert found.shape == oracle.shape
    np.testing.assert_allclose(found, oracle, atol=0.3, rtol=0)
    best, second = np.sort(oracle, axis=1)[:, :-3:-1].T
    clear = best - second > 0.3
    assert clear.sum() >= 14 and (found.argmax(1) == oracle.argmax(1))[clear].all()


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_weights_of_ones_own(tmp_path: Path, make_video: Callable, greys: Callable, precision: str) -> None:
    weights = {name: x.contiguous() for name, x in I3D(3, 0).state_dict().items()}
    save_file(weights, tmp_path / "mine.safetensors")
    path = make_video("v.mkv", greys(12))
    arguments = [
        "features",
        path,
        "--out",
        tmp_path / "out",
        "--weights",
        tmp_path / "mine.safetensors",
        "--window",
        10,
    ]
    done = CliRunner().invoke(app, [*map(str, arguments), "--precision", precision])
    assert done.exit_code == 0, done.stderr
    values = np.load(tmp_path / "out" / "v.npy")
    assert values.shape == (1, 1024) and np.isfinite(values).all()
    refused = CliRunner().invoke(app, [*map(str, arguments), "--extractor", "kinetics400"])
    assert refused.exit_code == 2 and "a classifier of 0 classes, and --extractor kinetics400 needs" in refused.stderr
