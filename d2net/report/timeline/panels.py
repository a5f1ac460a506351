"""The panels of a recording: its frames, its lanes, its curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from PIL import Image  # matplotlib needs it too

from d2net.errors import InputError
from d2net.reading import check_ordinary
from d2net.report.names import fit
from d2net.report.timeline.rows import TimelineRow, Track
from d2net.report.timeline.style import BESIDE, FRAMES, GREEN, GREY, Style, track_colour


def draw_frames(figure: Figure, ax: Axes, paths: Sequence[Path], end: float) -> None:
    """As many frames side by side as fit, evenly spaced, each where it was taken."""
    width, height = _open_image(paths[0]).size
    dots = ax.transData.transform([(0, 0), (end, 0)])[:, 0]
    inches = float(dots[1] - dots[0]) / figure.dpi
    count = max(1, min(len(paths), int(inches / (FRAMES * width / height + 0.05))))
    for i in range(count):
        middle = (i + 0.5) / count
        image = _open_image(paths[int(middle * len(paths))])
        image.thumbnail((10_000, int(FRAMES * 300)))  # 300 dots per inch are enough for any printer
        box = OffsetImage(np.asarray(image), zoom=72 * FRAMES / image.height)  # a pixel is a point at zoom 1
        ax.add_artist(
            AnnotationBbox(box, (middle * end, 0.5), xycoords=("data", "axes fraction"), frameon=False, pad=0)
        )


def _open_image(path: Path) -> Image.Image:
    try:
        check_ordinary(path)
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # a damaged image can raise anything
        raise InputError(f"{path}: not a readable image; extract it again or take it out of the folder") from error


def draw_lanes(ax: Axes, row: TimelineRow, classes: Sequence[str], style: Style, end: float) -> None:
    """One lane a class, the first on top; in it the ground truth, then each track's detections."""
    n = len(row.tracks)
    height = style.head + 0.5 * n
    curves = {c for t in row.tracks for c in row.curves(t)}
    ticks: list[tuple[float, str, dict[str, object]]] = []
    for i, c in enumerate(classes):
        y = height * (len(classes) - 1 - i)
        truth = [(s, e - s) for s, e, label in row.ground_truth if label == c]
        ax.broken_barh(truth, (y + 0.5 * n + 0.08, 0.32), color=GREEN, lw=0.4, zorder=2)
        if n < 2:
            ticks.append((y + 0.5 * height, fit(c, BESIDE, 7.5, lines=2), {}))
        else:
            name = fit(c, BESIDE, 7.5, lines=2, bold=True)
            # Two lines are as high as the ground truth's half of the lane.
            ticks.append((y + 0.5 * n + 0.24, name, {"weight": "bold", "size": 6.5 if "\n" in name else 7.5}))
        for k, (track, best) in enumerate(zip(row.tracks, style.best, strict=True)):
            floor = y + 0.05 + 0.5 * (n - 1 - k)
            # The floor of the lane ties the class to its curve.
            colour, line = style.classes[c] if c in curves and k == n - 1 else ("#cccccc", "-")
            ax.plot([0, end], [floor, floor], color=colour, ls=line, lw=1.1 if k == n - 1 else 0.6, zorder=3)
            if n > 1:
                ticks.append((floor + 0.2, fit(track.label, BESIDE, 7), {"color": track_colour(k), "size": 7}))
            if track.classes is not None and c not in track.classes:
                where = ax.get_yaxis_transform()  # or it would say that nothing was found
                ax.text(
                    0.005, floor + 0.2, "not trained on this class", transform=where, size=6.5, color=GREY, va="center"
                )
            boxes = []
            for start, stop, label, score in track.detections:
                if label == c:
                    top = floor + 0.45 * (max(score, 0.0) / best if best > 0 else 1)
                    boxes.append([(start, floor), (start, top), (stop, top), (stop, floor)])
            face, edge = (track_colour(k), 0.55), track_colour(k)
            ax.add_collection(PolyCollection(boxes, facecolor=face, edgecolor=edge, linewidth=0.5, zorder=2))
    ax.set_ylim(0, height * max(len(classes), 1))
    ax.set_yticks([t[0] for t in ticks], [t[1] for t in ticks], fontsize=7.5)
    for text, (_, _, looks) in zip(ax.get_yticklabels(), ticks, strict=True):
        text.set(parse_math=False, linespacing=1.0, **looks)
    ax.tick_params(axis="y", length=0)
    ax.spines[:].set_visible(False)


def draw_curves(ax: Axes, row: TimelineRow, track: Track, classes: Sequence[str], style: Style) -> None:
    assert track.tcam is not None
    seconds = row.first_snippet + (np.arange(len(track.tcam)) + 0.5) * row.seconds_per_snippet  # each one's middle
    thick = min(1.1, max(0.4, 900 / len(seconds)))  # points; thinner where there is little room for each snippet
    if track.attention is not None:
        ax.plot(seconds, track.attention, color=GREY, lw=min(thick, 0.7), zorder=2)
    curves = row.curves(track)
    for c in classes:
        if c in curves:
            colour, line = style.classes[c]
            ax.plot(seconds, curves[c], color=colour, ls=line, lw=thick, zorder=3)
    ax.set_ylim(-0.03, 1.03)
    ax.set_yticks([0, 0.5, 1], ["0", "0.5", "1"], fontsize=7)
    ax.grid(axis="y", color="#e4e4e4", lw=0.5, zorder=0)
    ax.set_axisbelow(True)
    ax.set_ylabel("TCAM", fontsize=7.5)
    ax.tick_params(axis="y", length=2.5, width=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_linewidth(0.6)
