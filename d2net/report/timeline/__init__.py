"""The timeline picture (the paper's Fig. 1 and 5): frames, ground truth, detections and activations over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from d2net.errors import InputError
from d2net.report.names import fonts_for
from d2net.report.pictures import check_picture, save_figure
from d2net.report.timeline.figure import COMMON_AXIS, timeline_figure
from d2net.report.timeline.rows import MAX_CLASSES, TimelineRow, Track, best_scores, check_row

__all__ = [
    "COMMON_AXIS",
    "MAX_CLASSES",
    "MIN_SCORE",
    "TimelineRow",
    "Track",
    "best_scores",
    "check_row",
    "draw_timeline",
]

MIN_SCORE = 0.25  # detections are drawn from this fraction of their track's best score in the picture on


def draw_timeline(path: Path, rows: Sequence[TimelineRow], *, min_score: float = MIN_SCORE, dpi: int = 200) -> int:
    """Draw recordings below each other and save the picture.

    A recording begins with a row of its frames, if there are any. Then each class has a lane: ground truth as a green
    bar, and below it one row of detections per track, as high as their score (a track's highest score in the whole
    picture fills its row). Under the lanes are the class activations of each track that has them, one colour per class
    in the whole picture (also the floor of its lane), and the bottom-up attention, thin grey. Recordings share one
    time axis unless their lengths differ by more than ``COMMON_AXIS``.

    Args:
        path: Where to save; the suffix says how: .png, .pdf or .svg. Written whole or not at all.
        rows: The recordings, at least one.
        min_score: Draw detections from this share of their track's highest score in the picture, which the picture
            says; 0 draws all. Where the highest is not above 0 all are drawn, equally high.
        dpi: Dots per inch of a PNG; the picture is 7 inches wide (a paper's two columns).

    Returns:
        How many detections are below ``min_score`` and not drawn.

    Raises:
        InputError: unknown suffix, no row, tracks that differ, arrays that do not fit the classes, a share outside
            [0, 1], an image that cannot be read, or a file that cannot be written.

    Warns:
        UserWarning: no installed font has some letters of the names.
    """
    path = Path(path)
    check_picture(path)
    if not rows:
        raise InputError(f"{path}: there is no recording to draw; choose at least one")
    if not 0 <= min_score <= 1:
        raise InputError(f"min_score is {min_score}, a share of the best score; give a number from 0 to 1")
    for row in rows:
        check_row(row, [t.label for t in rows[0].tracks])
    shown, hidden = _above(rows, min_score)
    with fonts_for([name for r in shown for name in (r.name, *r.shown_classes()[0], *(t.label for t in r.tracks))]):
        save_figure(path, timeline_figure(shown, min_score), dpi)
    return hidden


def _above(rows: Sequence[TimelineRow], min_score: float) -> tuple[list[TimelineRow], int]:
    """The rows with the detections from this fraction of their track's best score on, and the number of the others."""
    best = best_scores(rows)
    kept, hidden = [], 0
    for row in rows:
        tracks = []
        for track, top in zip(row.tracks, best, strict=True):
            detections = [d for d in track.detections if top <= 0 or min_score == 0 or d[3] >= min_score * top]
            hidden += len(track.detections) - len(detections)
            tracks.append(replace(track, detections=detections, verdicts=None))
        kept.append(replace(row, tracks=tracks))
    return kept, hidden
