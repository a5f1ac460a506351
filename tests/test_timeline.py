"""The timeline picture: it is written, shows what it is given, and refuses what it cannot draw."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from matplotlib.offsetbox import AnnotationBbox
from matplotlib.text import Text
from PIL import Image

from d2net.errors import InputError
from d2net.report import TimelineRow, Track, draw_timeline
from d2net.report.names import plain
from d2net.report.timeline import COMMON_AXIS, MAX_CLASSES, MIN_SCORE
from d2net.report.timeline.figure import timeline_figure
from d2net.report.timeline.style import FRAMES, GREEN

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
    empty = change(replace(row, ground_truth=[], duration=60.0), detections=[], tcam=None, attention=None)
    draw_timeline(bare, [empty], dpi=100)
    assert imread(full).shape[1] == 700
    assert pixels(full, GREEN) > 1000 and blueish(full) > 1000
    assert pixels(bare, GREEN) == blueish(bare) == 0  # the legend says nothing of them either


def test_a_higher_score_is_a_higher_bar(row: TimelineRow, tmp_path: Path) -> None:
    def blue(score: float) -> int:
        # the first recording holds the scale
        path = tmp_path / "score.png"
        draw_timeline(path, [row, change(row, detections=[(5.0, 55.0, "run", score)])], min_score=0)
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
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        draw_timeline(tmp_path / "file" / "p.png", [row])
    (tmp_path / "p.png").mkdir()
    with pytest.raises(InputError, match="not an ordinary file"):
        draw_timeline(tmp_path / "p.png", [row])
    assert sorted(os.listdir(tmp_path)) == ["file", "p.png"]


def test_what_cannot_be_drawn(row: TimelineRow, tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    with pytest.raises(InputError, match="name it .png, .pdf or .svg"):
        draw_timeline(tmp_path / "p.gif", [row])
    with pytest.raises(InputError, match="no recording"):
        draw_timeline(path, [])
    two = replace(row, tracks=[*row.tracks, Track("b", [])])
    with pytest.raises(InputError, match="min_score is 25"):
        draw_timeline(path, [row], min_score=25)
    for rows, message in (
        ([change(row, tcam=np.zeros((5, 2)))], r"clip_0001.*\(5, 2\)"),
        ([change(row, tcam=np.zeros((0, 3)), attention=None)], "T > 0"),
        ([change(row, attention=np.zeros(7))], r"attention has shape \(7,\)"),
        ([change(row, tcam=None)], "none without a tcam"),
        ([change(row, classes=("run", "jump"))], r"\(120, 3\), expected \(T, 2\)"),
        ([change(row, classes=("run", "jump", "swim"))], "'swim' is none of its classes"),
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
    draw_timeline(tmp_path / "p.svg", [both], min_score=0.1)
    text = (tmp_path / "p.svg").read_text()
    # Beside the lane of each of the three classes, above the curves (which only the first has) and in the legend.
    assert text.count("<!-- base $l$ -->") == 4 and text.count("<!-- ours -->") == 3
    assert "<!-- base $l$ (height: score) -->" in text and "<!-- ours (height: score) -->" in text
    assert text.count("<!-- detections from 10 % of each one's best score -->") == 1


def test_every_track_has_its_own_scale(row: TimelineRow) -> None:
    """Scores of different tools are not comparable; the best of each fills its row."""
    tracks = [Track("a", [(0.0, 9.0, "run", 0.5)]), Track("b", [(0.0, 9.0, "run", 200.0)])]
    lanes = timeline_figure([replace(row, ground_truth=[], tracks=tracks)]).axes[0]
    boxes = [b for c in lanes.collections for p in c.get_paths() for b in [p.get_extents()] if b.height > 0.4]
    assert len(boxes) == 2 and boxes[0].height == pytest.approx(boxes[1].height)


def test_recordings_share_an_axis_unless_one_is_much_longer(row: TimelineRow) -> None:
    def limits(seconds: float) -> set[float]:
        rows = [replace(row, duration=seconds), row]
        return {ax.get_xlim()[1] for ax in timeline_figure(rows).axes}

    assert limits(100) == {100}
    assert limits(60 * COMMON_AXIS + 1) == {60 * COMMON_AXIS + 1, 60}


def test_frames_are_evenly_spaced_and_do_not_overlap(row: TimelineRow, tmp_path: Path) -> None:
    paths = []
    for i in range(30):
        paths.append(tmp_path / f"{i:02}.png")
        Image.new("RGB", (32, 24), (8 * i, 0, 0)).save(paths[-1])
    figure = timeline_figure([replace(row, frames=paths), replace(row, duration=30)])
    strip = figure.axes[0]
    boxes = [a for a in strip.artists if isinstance(a, AnnotationBbox)]
    times = np.array([b.xy[0] for b in boxes])
    assert len(boxes) > 3 and np.allclose(np.diff(times), 60 / len(boxes))
    # Each shows what lies at its time: the red of frame i is 8 i, and frame i is taken at 2 i + 1 s of 60.
    red = np.array([b.offsetbox.get_data()[0, 0, 0] for b in boxes])
    assert np.abs(red / 8 * 2 + 1 - times).max() <= 1
    inches = np.diff(strip.transData.transform([(0, 0), (60, 0)])[:, 0])[0] / figure.dpi
    assert FRAMES * 4 / 3 * len(boxes) <= inches + 0.05 * FRAMES * 4 / 3 * len(boxes)


def legend(*rows: TimelineRow, min_score: float = 0.0) -> set[str]:
    return {t.get_text() for box in timeline_figure(rows, min_score).legends for t in box.get_texts()}


def test_the_legend_has_what_is_drawn_and_nothing_else(row: TimelineRow) -> None:
    track = row.tracks[0]
    curves, height = set(CLASSES), "detection (height: score)"
    assert legend(row) == {"ground truth", height, "bottom-up attention", *curves}
    assert legend(replace(row, ground_truth=[])) == {height, "bottom-up attention", *curves}
    assert legend(change(row, attention=None)) == {"ground truth", height, *curves}
    assert legend(change(row, attention=None, tcam=None)) == {"ground truth", height}
    # No lane for "jump" without a detection, and so no curve.
    assert legend(change(row, detections=[])) == {"ground truth", "bottom-up attention", *curves} - {"jump"}
    empty = replace(row, ground_truth=[], duration=60.0)
    assert legend(change(empty, detections=[], tcam=None, attention=None)) == set()
    two = replace(row, tracks=[replace(track, label="a"), Track("b", [])])
    assert legend(two) == {"ground truth", "a (height: score)", "bottom-up attention", *curves}
    # A class that no model has gets a lane, but no curve.
    its = replace(track, tcam=track.tcam[:, :2], classes=CLASSES[:2])  # type: ignore[index]
    assert legend(replace(row, tracks=[its])) == {"ground truth", height, "bottom-up attention", *CLASSES[:2]}
    # Of two recordings one is enough.
    assert "ground truth" in legend(replace(row, ground_truth=[]), row)


def test_low_scores_are_not_drawn_but_counted(row: TimelineRow, tmp_path: Path) -> None:
    path = tmp_path / "p.svg"
    assert MIN_SCORE == 0.25
    assert draw_timeline(path, [row]) == 1  # 0.1 of 0.9, the only "jump"
    assert "<!-- detections from 25 % of the best score -->" in path.read_text()
    assert "jump" not in path.read_text()
    assert draw_timeline(path, [row], min_score=0) == 0
    assert "<!-- jump -->" in path.read_text() and "best score" not in path.read_text()
    assert draw_timeline(path, [row], min_score=0.3 / 0.9) == 1  # the share itself is drawn
    assert draw_timeline(path, [row], min_score=1) == 2
    # The best of the picture counts, and every track has its own.
    poor = change(row, detections=[(1.0, 2.0, "run", 0.2)])
    assert draw_timeline(path, [row, poor]) == 2
    both = replace(row, tracks=[*poor.tracks, Track("b", row.tracks[0].detections)])
    assert draw_timeline(path, [both]) == 1


def test_scores_that_are_not_positive_are_drawn_equally_high(row: TimelineRow, tmp_path: Path) -> None:
    logs = change(row, detections=[(1.0, 2.0, "run", -3.0), (4.0, 5.0, "run", -0.1)])
    path = tmp_path / "p.svg"
    assert draw_timeline(path, [logs]) == 0
    assert "<!-- detection (no score above 0) -->" in path.read_text() and "best score" not in path.read_text()
    lanes = timeline_figure([replace(logs, ground_truth=[])]).axes[0]
    boxes = [b.height for c in lanes.collections for p in c.get_paths() for b in [p.get_extents()]]
    assert len(boxes) == 2 and min(boxes) == max(boxes) > 0.4


def test_curves_begin_at_the_first_snippet(row: TimelineRow) -> None:
    late = replace(row, first_snippet=7.0)
    assert late.end() == 67.0
    for each, first in ((row, 0.25), (late, 7.25)):
        curves = timeline_figure([each]).axes[1].lines
        assert len(curves) == 4  # attention and three classes
        for curve in curves:
            np.testing.assert_allclose(curve.get_xdata(), first + 0.5 * np.arange(120))


def test_models_of_other_classes_say_what_they_do_not_know(row: TimelineRow, tmp_path: Path) -> None:
    known = Track("a", [(1.0, 2.0, "jump", 0.5)], np.tile([0.2, 0.9], (120, 1)), classes=("jump", "run"))
    draw_timeline(tmp_path / "p.svg", [replace(row, tracks=[known, Track("b", [])])])
    assert (tmp_path / "p.svg").read_text().count("<!-- not trained on this class -->") == 1  # of "throw $x$"
    values = {tuple(set(line.get_ydata())) for line in timeline_figure([replace(row, tracks=[known])]).axes[1].lines}
    assert values == {(0.2,), (0.9,)}


def test_recordings_say_what_their_lanes_cannot(row: TimelineRow, tmp_path: Path) -> None:
    def titles(*rows: TimelineRow) -> list[str]:
        draw_timeline(tmp_path / "p.svg", rows)
        lines = (tmp_path / "p.svg").read_text().splitlines()
        return [line.strip()[5:-4] for line in lines if "<!-- clip_0001" in line]

    bare = change(replace(row, ground_truth=[]), detections=[])
    assert titles(row, bare) == ["clip_0001", "clip_0001   (no ground-truth segment, no detection drawn)"]
    assert titles(bare) == ["clip_0001   (no detection drawn)"]
    names = tuple("abcdef")
    assert titles(
        change(
            replace(row, classes=names, ground_truth=[(0.0, 1.0, c) for c in names]),
            detections=[],
            tcam=None,
            attention=None,
        )
    ) == ["clip_0001   (+ 1 more class not shown, no detection drawn)"]


def stress(classes: Sequence[str], seconds: float = 60.0, tracks: int = 1, name: str = "clip") -> TimelineRow:
    """A recording with each class in the ground truth and found by each track."""
    starts = np.linspace(0, 0.8 * seconds, len(classes))
    truth = [(float(t), float(t) + seconds / 10, c) for t, c in zip(starts, classes, strict=True)]
    tcam = np.full((max(int(seconds / 0.5), 1), len(classes)), 0.5)
    label = "runs_thumos14_features_i3d_seed_{}_learning_rate_0.0001"
    its = [Track(label.format(k), [(*s, 0.9) for s in truth], tcam, tcam[:, 0]) for k in range(tracks)]
    return TimelineRow(name, 0.5, classes, truth, its, duration=seconds)


FORTY = [f"{x}_and_polishing_of_the_kitchen_window_{i}" for i, x in enumerate(["Cleaning", "Wiping", "Rubbing"])]


@pytest.mark.parametrize("tracks", [1, 2])
@pytest.mark.parametrize(
    "rows",
    [
        [{"classes": ["x"]}],
        [{"classes": [f"class number {i}" for i in range(20)]}] * 3,
        [{"classes": FORTY, "name": f"video ({', '.join(FORTY)})"}] * 2,
        [{"classes": ["Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft"]}],
        [{"classes": ["run", "jump"], "seconds": 5.0}, {"classes": ["run", "jump"], "seconds": 5000.0}],
        [{"classes": ["_hidden", "cost $5$ _{x}", "two\nlines", "a\tb\x07", "bytes \udcff"], "name": "a$b_c\nd$"}],
    ],
    ids=["one class", "twenty classes", "forty letters", "one word", "5 s and 5000 s", "odd letters"],
)
def test_texts_lie_within_the_picture_and_not_over_each_other(
    rows: list[dict[str, Any]], tracks: int, tmp_path: Path
) -> None:
    drawn = [stress(**each, tracks=tracks) for each in rows]
    draw_timeline(tmp_path / "p.svg", drawn)  # a lone surrogate could not be written
    figure = timeline_figure(drawn, MIN_SCORE)
    figure.draw_without_rendering()
    texts = [t for t in figure.findobj(Text) if t.get_text() and t.get_visible()]
    boxes = []
    for text in texts:
        axis = next((a for ax in figure.axes for a in (ax.xaxis, ax.yaxis) if text in a.get_ticklabels()), None)
        if axis is None or axis.get_tick_params()[f"label{'bottom' if axis.axis_name == 'x' else 'left'}"]:
            boxes.append((text.get_text(), text.get_window_extent()))
    picture = figure.bbox
    for said, box in boxes:
        assert picture.x0 <= box.x0 and box.x1 <= picture.x1 and picture.y0 <= box.y0 and box.y1 <= picture.y1, said
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        wide, high = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert wide <= 1 or high <= 1, (one, other)
    assert all(ax.get_position().width > 0.7 for ax in figure.axes)  # names leave room for what they name
    said = {t.get_text() for box in figure.legends for t in box.get_texts()}
    for name in drawn[0].shown_classes()[0]:
        assert any(plain(name)[:3] in each for each in said)


def test_without_ground_truth_lanes_are_lower(row: TimelineRow) -> None:
    def inches(*rows: TimelineRow) -> float:
        return float(timeline_figure(rows).get_figheight())

    bare = replace(row, ground_truth=[])
    assert inches(bare) < inches(row) and inches(bare, row) == inches(row, row)
