"""The timeline picture: it is written, shows what it is given, and refuses what it cannot draw."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from d2net.errors import InputError
from d2net.report import TimelineRow, draw_timeline
from d2net.report.timeline import GREEN, MAX_CLASSES

CLASSES = ("run", "jump", "throw $x$")


@pytest.fixture
def row() -> TimelineRow:
    t = np.arange(120)
    return TimelineRow(
        name="clip_0001",
        seconds_per_snippet=0.5,
        classes=CLASSES,
        tcam=np.stack([np.sin(t / 9) ** 2, np.cos(t / 9) ** 2, t / 240], axis=1),
        attention=np.full(120, 0.4),
        ground_truth=[(5.0, 20.0, "run"), (30.0, 40.0, "throw $x$")],
        detections=[(6.0, 19.0, "run", 0.9), (31.0, 44.0, "throw $x$", 0.3), (50.0, 55.0, "jump", 0.1)],
    )


def pixels(path: Path, colour: str) -> int:
    """How many pixels have this colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return int((np.abs(imread(path)[..., :3] - wanted) < 0.02).all(axis=-1).sum())


def blueish(path: Path) -> int:
    """How many pixels show a detection, alone or over another."""
    image = imread(path)[..., :3]
    return int((image[..., 2] - image[..., 0] > 0.25).sum())


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_written_in_every_format(row: TimelineRow, tmp_path: Path, suffix: str, magic: bytes) -> None:
    path = tmp_path / f"picture.{suffix}"
    draw_timeline(path, [row, replace(row, name="clip_0002", attention=None)])
    assert path.read_bytes().startswith(magic)
    assert os.listdir(tmp_path) == [path.name]  # no temporary file is left


def test_shows_ground_truth_and_detections(row: TimelineRow, tmp_path: Path) -> None:
    full, bare = tmp_path / "full.png", tmp_path / "bare.png"
    draw_timeline(full, [row], dpi=100)
    draw_timeline(bare, [replace(row, ground_truth=[], detections=[])], dpi=100)
    assert imread(full).shape[1] == 700
    assert pixels(full, GREEN) > 3 * pixels(bare, GREEN) > 0  # the legend alone is in both
    assert blueish(full) > 3 * blueish(bare) > 0


def test_a_higher_score_is_a_higher_bar(row: TimelineRow, tmp_path: Path) -> None:
    def blue(score: float) -> int:
        # the first recording holds the scale
        path = tmp_path / "score.png"
        draw_timeline(path, [row, replace(row, detections=[(5.0, 55.0, "run", score)])])
        return blueish(path)

    assert blue(0.1) < blue(0.5) < blue(0.9)


def test_names_appear_in_the_svg_unaltered(row: TimelineRow, tmp_path: Path) -> None:
    path = tmp_path / "p.svg"
    draw_timeline(path, [row])
    text = path.read_text()
    for name in ("clip_0001", "throw $x$", "ground truth", "time (s)"):
        assert f"<!-- {name} -->" in text


def test_shown_classes_are_limited_and_counted(row: TimelineRow) -> None:
    names = tuple("abcdefgh")
    many = replace(
        row,
        classes=names,
        ground_truth=[(0, 1, "h")],
        detections=[(0, 1, c, i / 10) for i, c in enumerate(names[:7])],
    )
    assert many.shown_classes() == (["d", "e", "f", "g", "h"], 3)
    assert MAX_CLASSES == 5


def test_drawing_leaves_pyplot_and_settings_alone(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np, matplotlib as m; from d2net.report import *; before = m.rcParams['pdf.fonttype']\n"
        "draw_timeline(sys.argv[1], [TimelineRow('a', 1.0, ['x'], np.ones((3, 1)), None, [], [])])\n"
        "assert 'matplotlib.pyplot' not in sys.modules and m.rcParams['pdf.fonttype'] == before"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "p.png")], check=True)


def test_unwritable_places(row: TimelineRow, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent.*p\.png: cannot be written"):
        draw_timeline(tmp_path / "absent" / "p.png", [row])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        draw_timeline(tmp_path / "file" / "p.png", [row])
    (tmp_path / "p.png").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        draw_timeline(tmp_path / "p.png", [row])
    assert sorted(os.listdir(tmp_path)) == ["file", "p.png"]


def test_what_cannot_be_drawn(row: TimelineRow, tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    with pytest.raises(InputError, match="name it .png, .pdf or .svg"):
        draw_timeline(tmp_path / "p.gif", [row])
    with pytest.raises(InputError, match="no recording"):
        draw_timeline(path, [])
    for change, message in (
        ({"tcam": np.zeros((5, 2))}, r"clip_0001.*\(5, 2\)"),
        ({"tcam": np.zeros((0, 3)), "attention": None}, "T > 0"),
        ({"attention": np.zeros(7)}, r"attention has shape \(7,\)"),
        ({"seconds_per_snippet": 0.0}, "positive"),
        ({"ground_truth": [(0.0, 1.0, "swim")]}, "'swim' is none of its classes"),
    ):
        with pytest.raises(InputError, match=message):
            draw_timeline(path, [replace(row, **change)])
    assert not path.exists()
