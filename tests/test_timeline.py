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
from matplotlib.offsetbox import AnnotationBbox
from PIL import Image

from d2net.errors import InputError
from d2net.report import TimelineRow, Track, draw_timeline
from d2net.report.timeline import COMMON_AXIS, FRAMES, GREEN, MAX_CLASSES, _figure

CLASSES = ("run", "jump", "throw $x$")


@pytest.fixture
def row() -> TimelineRow:
    t = np.arange(120)
    return TimelineRow(
        name="clip_0001",
        seconds_per_snippet=0.5,
        classes=CLASSES,
        ground_truth=[(5.0, 20.0, "run"), (30.0, 40.0, "throw $x$")],
        tracks=[
            Track(
                label="",
                detections=[(6.0, 19.0, "run", 0.9), (31.0, 44.0, "throw $x$", 0.3), (50.0, 55.0, "jump", 0.1)],
                tcam=np.stack([np.sin(t / 9) ** 2, np.cos(t / 9) ** 2, t / 240], axis=1),
                attention=np.full(120, 0.4),
            )
        ],
    )


def change(row: TimelineRow, **values: object) -> TimelineRow:
    """The row with values of its only track replaced."""
    return replace(row, tracks=[replace(row.tracks[0], **values)])


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
    draw_timeline(path, [row, change(replace(row, name="clip_0002"), attention=None)])
    assert path.read_bytes().startswith(magic)
    assert os.listdir(tmp_path) == [path.name]  # no temporary file is left


def test_shows_ground_truth_and_detections(row: TimelineRow, tmp_path: Path) -> None:
    full, bare = tmp_path / "full.png", tmp_path / "bare.png"
    draw_timeline(full, [row], dpi=100)
    draw_timeline(bare, [change(replace(row, ground_truth=[]), detections=[])], dpi=100)
    assert imread(full).shape[1] == 700
    assert pixels(full, GREEN) > 3 * pixels(bare, GREEN) > 0  # the legend alone is in both
    assert blueish(full) > 3 * blueish(bare) > 0


def test_a_higher_score_is_a_higher_bar(row: TimelineRow, tmp_path: Path) -> None:
    def blue(score: float) -> int:
        # the first recording holds the scale
        path = tmp_path / "score.png"
        draw_timeline(path, [row, change(row, detections=[(5.0, 55.0, "run", score)])])
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
    many = change(
        replace(row, classes=names, ground_truth=[(0, 1, "h")]),
        detections=[(0, 1, c, i / 10) for i, c in enumerate(names[:7])],
    )
    assert many.shown_classes() == (["d", "e", "f", "g", "h"], 3)
    assert MAX_CLASSES == 5


def test_drawing_leaves_pyplot_and_settings_alone(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np, matplotlib as m; from d2net.report import *; before = m.rcParams['pdf.fonttype']\n"
        "draw_timeline(sys.argv[1], [TimelineRow('a', 1.0, ['x'], [], [Track('', [], np.ones((3, 1)))])])\n"
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
    two = replace(row, tracks=[*row.tracks, Track("b", [])])
    for rows, message in (
        ([change(row, tcam=np.zeros((5, 2)))], r"clip_0001.*\(5, 2\)"),
        ([change(row, tcam=np.zeros((0, 3)), attention=None)], "T > 0"),
        ([change(row, attention=np.zeros(7))], r"attention has shape \(7,\)"),
        ([change(row, tcam=None)], "none without a tcam"),
        ([replace(row, seconds_per_snippet=0.0)], "positive"),
        ([replace(row, ground_truth=[(0.0, 1.0, "swim")])], "'swim' is none of its classes"),
        ([replace(row, ground_truth=[], tracks=[Track("", [])])], "how long it is"),
        ([row, two], "those of the first row"),
        ([replace(row, frames=[tmp_path / "absent.jpg"])], "absent.jpg: not a readable image"),
    ):
        with pytest.raises(InputError, match=message):
            draw_timeline(path, rows)
    assert not path.exists()


def test_tracks_are_named_and_drawn_below_each_other(row: TimelineRow, tmp_path: Path) -> None:
    both = replace(row, tracks=[replace(row.tracks[0], label="base $l$"), Track("ours", [(6.0, 19.0, "run", 3.0)])])
    draw_timeline(tmp_path / "p.svg", [both])
    text = (tmp_path / "p.svg").read_text()
    # Beside the lane of each of the three classes, above the curves (which only the first has) and in the legend.
    assert text.count("<!-- base $l$ -->") == 4 and text.count("<!-- ours -->") == 3
    assert "<!-- base $l$ (height: score) -->" in text and "<!-- ours (height: score) -->" in text


def test_every_track_has_its_own_scale(row: TimelineRow) -> None:
    """Scores of different tools are not comparable; the best of each fills its row."""
    tracks = [Track("a", [(0.0, 9.0, "run", 0.5)]), Track("b", [(0.0, 9.0, "run", 200.0)])]
    lanes = _figure([replace(row, ground_truth=[], tracks=tracks)]).axes[0]
    boxes = [b for c in lanes.collections for p in c.get_paths() for b in [p.get_extents()] if b.height > 0.4]
    assert len(boxes) == 2 and boxes[0].height == pytest.approx(boxes[1].height)


def test_recordings_share_an_axis_unless_one_is_much_longer(row: TimelineRow) -> None:
    def limits(seconds: float) -> set[float]:
        rows = [replace(row, duration=seconds), row]
        return {ax.get_xlim()[1] for ax in _figure(rows).axes}

    assert limits(100) == {100}
    assert limits(60 * COMMON_AXIS + 1) == {60 * COMMON_AXIS + 1, 60}


def test_frames_are_evenly_spaced_and_do_not_overlap(row: TimelineRow, tmp_path: Path) -> None:
    paths = []
    for i in range(30):
        paths.append(tmp_path / f"{i:02}.png")
        Image.new("RGB", (32, 24), (8 * i, 0, 0)).save(paths[-1])
    figure = _figure([replace(row, frames=paths), replace(row, duration=30)])
    strip = figure.axes[0]
    boxes = [a for a in strip.artists if isinstance(a, AnnotationBbox)]
    times = np.array([b.xy[0] for b in boxes])
    assert len(boxes) > 3 and np.allclose(np.diff(times), 60 / len(boxes))
    # Each shows what lies at its time: the red of frame i is 8 i, and frame i is taken at 2 i + 1 s of 60.
    red = np.array([b.offsetbox.get_data()[0, 0, 0] for b in boxes])
    assert np.abs(red / 8 * 2 + 1 - times).max() <= 1
    inches = np.diff(strip.transData.transform([(0, 0), (60, 0)])[:, 0])[0] / figure.dpi
    assert FRAMES * 4 / 3 * len(boxes) <= inches + 0.05 * FRAMES * 4 / 3 * len(boxes)
