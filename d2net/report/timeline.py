"""The timeline picture (the paper's Fig. 1 and 5): frames, ground truth, detections and activations over time."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import Patch
from PIL import Image  # matplotlib needs it too

from d2net.errors import InputError
from d2net.files import write_whole
from d2net.reading import check_ordinary
from d2net.report.names import fit, fonts_for, plain, text_inches

FORMATS = ("png", "pdf", "svg")
MAX_CLASSES = 5  # classes shown of one recording
MIN_SCORE = 0.25  # detections drawn, as a share of the track's best score in the picture

GREEN, BLUE, GREY = "#1b8a5a", "#2f6db5", "#9a9a9a"
TRACK_COLOURS = (BLUE, "#b8455a", "#6f6f6f", "#8a7a1f", "#3f9a9a")  # every lane is labelled too
# After Okabe and Ito: told apart with every kind of colour vision, and none is the green or blue of the bars.
CLASS_COLOURS = ("#d55e00", "#7a4ea3", "#e69f00", "#cc79a7", "#000000", "#56b4e9", "#8c510a")
LINE_STYLES = ("-", "--", ":", "-.")  # the next style each time the colours are used up

WIDTH = 7.0  # inches: the two columns of a paper
LANE, CURVES, FRAMES = 0.36, 0.85, 0.62  # heights in inches: ground truth and one track, activations, frames
BESIDE, IN_LEGEND = 1.5, 2.9  # inches for a name beside its lane, and for an entry of the legend
# A longest recording more than this many times the shortest one would leave that nothing to see on a common axis.
COMMON_AXIS = 3.0


@dataclass(frozen=True)
class Track:
    """What one model, or one file of detections, says of a recording.

    Attributes:
        label: Its name in the picture; not shown where a picture has one track only.
        detections: (start s, end s, class name, score) rows.
        tcam: (T, C) temporal class activation map, in [0, 1], or None where only the detections are known.
        attention: (T,) bottom-up attention in [0, 1], or None.
        classes: (C,) names of the columns of ``tcam``, some of the row's; None: all of them, in its order.
    """

    label: str
    detections: Sequence[tuple[float, float, str, float]]
    tcam: np.ndarray | None = None
    attention: np.ndarray | None = None
    classes: Sequence[str] | None = None


@dataclass(frozen=True)
class TimelineRow:
    """One recording of the picture.

    Attributes:
        name: Written above the recording's block.
        seconds_per_snippet: Seconds from one snippet to the next.
        classes: Names of all that is drawn, in the order of the lanes.
        ground_truth: (start s, end s, class name) rows.
        tracks: What is compared; the same labels in the same order in every recording of a picture.
        duration: Length in seconds; the block is longer where a segment or an activation lies past it.
        frames: Images of the recording in order of time, evenly spaced from its beginning to its end.
        first_snippet: Seconds at which snippet 0 begins.
    """

    name: str
    seconds_per_snippet: float
    classes: Sequence[str]
    ground_truth: Sequence[tuple[float, float, str]]
    tracks: Sequence[Track]
    duration: float = 0.0
    frames: Sequence[Path] = ()
    first_snippet: float = 0.0

    def shown_classes(self) -> tuple[list[str], int]:
        """The classes to draw, in the order of ``classes``, and how many others there are.

        Those of the ground truth come first, then the detected ones by falling score (as a share of the track's best
        one; of equal ones by name), up to ``MAX_CLASSES``.
        """
        detected = []
        for track in self.tracks:
            best = max((d[3] for d in track.detections), default=0.0)
            detected += [(d[3] / best if best > 0 else 0.0, d[2]) for d in track.detections]
        detected.sort(key=lambda d: (-d[0], d[1]))
        truth = {g[2] for g in self.ground_truth}
        relevant = list(dict.fromkeys([c for c in self.classes if c in truth] + [d[1] for d in detected]))
        shown = set(relevant[:MAX_CLASSES])
        return [c for c in self.classes if c in shown], len(relevant) - len(shown)

    def end(self) -> float:
        """Seconds from the beginning to the end of all that is drawn."""
        return max(
            [
                self.duration,
                *(g[1] for g in self.ground_truth),
                *(d[1] for t in self.tracks for d in t.detections),
                *(
                    self.first_snippet + len(t.tcam) * self.seconds_per_snippet
                    for t in self.tracks
                    if t.tcam is not None
                ),
            ]
        )

    def _curves(self, track: Track) -> dict[str, np.ndarray]:
        """(T,) activations of each class that the track has."""
        if track.tcam is None:
            return {}
        return dict(zip(self.classes if track.classes is None else track.classes, track.tcam.T, strict=True))


def check_picture(path: Path) -> str:
    """The format that the suffix of ``path`` asks for. Raises InputError when pictures cannot be written so."""
    kind = path.suffix.lower().lstrip(".")
    if kind not in FORMATS:
        raise InputError(f"{path}: cannot draw a '{path.suffix}' file; name it .png, .pdf or .svg")
    return kind


def save_figure(path: Path, figure: Figure, dpi: int) -> None:
    """Save in the format of the suffix, whole or not at all, within :func:`d2net.report.names.fonts_for`.

    Raises:
        InputError: it cannot be written.
    """
    content = io.BytesIO()
    figure.savefig(content, format=check_picture(path), dpi=dpi)
    write_whole(path, content.getvalue())


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
        _check(row, [t.label for t in rows[0].tracks])
    shown, hidden = _above(rows, min_score)
    with fonts_for([name for r in shown for name in (r.name, *r.shown_classes()[0], *(t.label for t in r.tracks))]):
        save_figure(path, _figure(shown, min_score), dpi)
    return hidden


def _check(row: TimelineRow, labels: Sequence[str]) -> None:
    where = f"timeline of '{row.name}'"
    if [t.label for t in row.tracks] != labels:
        raise InputError(f"{where}: tracks are {[t.label for t in row.tracks]}, those of the first row {labels}")
    for track in row.tracks:
        classes = row.classes if track.classes is None else track.classes
        shape = None if track.tcam is None else track.tcam.shape
        if shape is not None and (len(shape) != 2 or shape[1] != len(classes) or shape[0] == 0):
            raise InputError(f"{where}: tcam has shape {tuple(shape)}, expected (T, {len(classes)}), T > 0")
        if track.attention is not None and (shape is None or track.attention.shape != shape[:1]):
            expected = "none without a tcam" if shape is None else f"({shape[0]},)"
            raise InputError(f"{where}: attention has shape {tuple(track.attention.shape)}, expected {expected}")
    if not row.seconds_per_snippet > 0:
        raise InputError(f"{where}: seconds_per_snippet is {row.seconds_per_snippet}; give a positive number")
    names = [g[2] for g in row.ground_truth]
    for track in row.tracks:
        names += [*(d[2] for d in track.detections), *(track.classes or ())]
    for label in names:
        if label not in row.classes:
            raise InputError(f"{where}: '{label}' is none of its classes: {', '.join(row.classes)}")
    if not row.end() > 0:
        raise InputError(f"{where}: nothing in it says how long it is; give its duration")


def _best(rows: Sequence[TimelineRow]) -> list[float]:
    """The highest score of each track; 0 for one without detections."""
    tracks = range(len(rows[0].tracks))
    return [max((d[3] for row in rows for d in row.tracks[k].detections), default=0.0) for k in tracks]


def _above(rows: Sequence[TimelineRow], min_score: float) -> tuple[list[TimelineRow], int]:
    """The rows with the detections from this share of their track's best, and how many others there are."""
    best = _best(rows)
    kept, hidden = [], 0
    for row in rows:
        tracks = []
        for track, top in zip(row.tracks, best, strict=True):
            detections = [d for d in track.detections if top <= 0 or min_score == 0 or d[3] >= min_score * top]
            hidden += len(track.detections) - len(detections)
            tracks.append(replace(track, detections=detections))
        kept.append(replace(row, tracks=tracks))
    return kept, hidden


@dataclass(frozen=True)
class _Style:
    """What is the same in the whole picture.

    Attributes:
        classes: (colour, line style) of each class shown.
        best: The highest score of each track.
        head: Height of a lane above the detections, for ground truth and the class's name.
    """

    classes: dict[str, tuple[str, str]]
    best: Sequence[float]
    head: float


def _figure(rows: Sequence[TimelineRow], min_score: float = 0.0) -> Figure:
    shown = [row.shown_classes() for row in rows]
    drawn = {c for classes, _ in shown for c in classes}
    names = [c for c in dict.fromkeys(c for row in rows for c in row.classes) if c in drawn]
    endless = ((colour, line) for line in itertools.cycle(LINE_STYLES) for colour in CLASS_COLOURS)
    tracks = range(len(rows[0].tracks))
    truth = any(row.ground_truth for row in rows)
    style = _Style(
        classes=dict(zip(names, endless, strict=False)),
        best=_best(rows),
        # Without ground truth in the whole picture, room for it would say that nothing happens.
        head=0.5 if truth or len(tracks) != 1 else 0.2,
    )
    ends = [row.end() for row in rows]
    common = max(ends) <= COMMON_AXIS * min(ends)

    blocks = [_heights(row, len(classes), style) for row, (classes, _) in zip(rows, shown, strict=True)]
    heights = [h for block in blocks for h in block]
    named = [*names, *(t.label for t in rows[0].tracks if len(tracks) > 1)]
    room = WIDTH - 0.2 - max([0.45, *(min(BESIDE, text_inches(plain(name), 7.5, bold=True)) for name in named)])
    titles = [
        fit(_title(row, hidden, truth), room, 8.5, lines=2, bold=True)
        for row, (_, hidden) in zip(rows, shown, strict=True)
    ]
    above = sum(0.3 + 0.14 * title.count("\n") for title in titles)
    above += 0.16 * sum(len(b) - 1 for b in blocks) if len(tracks) > 1 else 0
    figure = Figure(
        figsize=(WIDTH, sum(heights) + above + 0.8 + (0 if common else 0.25 * (len(rows) - 1))),
        layout=ConstrainedLayoutEngine(h_pad=0.03, w_pad=0.04, hspace=0.0),
    )
    panels = iter(figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
    strips = []
    for row, title, (classes, _), end, block in zip(rows, titles, shown, ends, blocks, strict=True):
        axes = [next(panels) for _ in block]
        limit = max(ends) if common else end
        for ax in axes:
            ax.set_xlim(0, limit)
            ax.tick_params(axis="x", bottom=False, labelbottom=False)
            if limit > end:
                ax.axvspan(end, limit, color="#f1f1f1", lw=0, zorder=0)  # after the end of a shorter recording
        axes[0].set_title(title, loc="left", fontsize=8.5, fontweight="bold", pad=3, parse_math=False)
        if row.frames:
            strips.append((axes[0], row.frames, end))
            axes[0].set_axis_off()
        lanes, *curves = axes[bool(row.frames) :]
        _draw_lanes(lanes, row, classes, style, end)
        for ax, k in zip(curves, (k for k in tracks if row.tracks[k].tcam is not None), strict=True):
            _draw_curves(ax, row, row.tracks[k], classes, style)
            if len(tracks) > 1:
                name = fit(row.tracks[k].label, room, 7.5)
                ax.set_title(name, loc="left", fontsize=7.5, color=_colour(k), pad=2, parse_math=False)
        if row is rows[-1] or not common:
            axes[-1].tick_params(axis="x", bottom=True, labelbottom=True, labelsize=7.5, length=2.5, width=0.6)
            axes[-1].spines["bottom"].set(visible=True, linewidth=0.6)
    axes[-1].set_xlabel("time (s)", fontsize=8)
    if min_score > 0 and any(best > 0 for best in style.best):
        whose = "the" if len(tracks) == 1 else "each one's"
        said = f"detections from {100 * min_score:g} % of {whose} best score"
        beside = ("axes fraction", axes[-1].xaxis.label)
        axes[-1].annotate(said, (1, 0.5), xycoords=beside, ha="right", va="center", fontsize=7, color="#555555")
    _draw_legend(figure, rows, shown, style)
    if strips:
        figure.draw_without_rendering()  # the layout says how wide a strip is, and so how many frames fit
        for ax, frames, end in strips:
            _draw_frames(figure, ax, frames, end)
    return figure


def _title(row: TimelineRow, hidden: int, truth: bool) -> str:
    """The recording's name, and what of it the lanes below cannot show."""
    said = []
    if hidden:
        said.append(f"+ {hidden} more class{'es' * (hidden > 1)} not shown")
    if truth and not row.ground_truth:
        said.append("no ground-truth segment")
    if row.tracks and not any(t.detections for t in row.tracks):
        said.append("no detection drawn")
    return row.name + (f"   ({', '.join(said)})" if said else "")


def _heights(row: TimelineRow, classes: int, style: _Style) -> list[float]:
    """Inches of a recording's panels: its frames, its lanes, one of curves for each track that has them."""
    lanes = LANE * (style.head + 0.5 * len(row.tracks)) * max(classes, 1)
    return [FRAMES] * bool(row.frames) + [lanes] + [CURVES] * sum(t.tcam is not None for t in row.tracks)


def _colour(track: int) -> str:
    return TRACK_COLOURS[track % len(TRACK_COLOURS)]


def _draw_frames(figure: Figure, ax: Axes, paths: Sequence[Path], end: float) -> None:
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


def _draw_lanes(ax: Axes, row: TimelineRow, classes: Sequence[str], style: _Style, end: float) -> None:
    """One lane a class, the first on top; in it the ground truth, then each track's detections."""
    n = len(row.tracks)
    height = style.head + 0.5 * n
    curves = {c for t in row.tracks for c in row._curves(t)}
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
                ticks.append((floor + 0.2, fit(track.label, BESIDE, 7), {"color": _colour(k), "size": 7}))
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
            face, edge = (_colour(k), 0.55), _colour(k)
            ax.add_collection(PolyCollection(boxes, facecolor=face, edgecolor=edge, linewidth=0.5, zorder=2))
    ax.set_ylim(0, height * max(len(classes), 1))
    ax.set_yticks([t[0] for t in ticks], [t[1] for t in ticks], fontsize=7.5)
    for text, (_, _, looks) in zip(ax.get_yticklabels(), ticks, strict=True):
        text.set(parse_math=False, linespacing=1.0, **looks)
    ax.tick_params(axis="y", length=0)
    ax.spines[:].set_visible(False)


def _draw_curves(ax: Axes, row: TimelineRow, track: Track, classes: Sequence[str], style: _Style) -> None:
    assert track.tcam is not None
    seconds = row.first_snippet + (np.arange(len(track.tcam)) + 0.5) * row.seconds_per_snippet  # each one's middle
    thick = min(1.1, max(0.4, 900 / len(seconds)))  # points; thinner where there is little room for each snippet
    if track.attention is not None:
        ax.plot(seconds, track.attention, color=GREY, lw=min(thick, 0.7), zorder=2)
    curves = row._curves(track)
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


def _draw_legend(
    figure: Figure, rows: Sequence[TimelineRow], shown: Sequence[tuple[Sequence[str], int]], style: _Style
) -> None:
    """What is drawn, and nothing else, in as many columns as fit."""
    entries = _legend_entries(rows, shown, style)
    if not entries:
        return

    def inches(columns: int) -> float:
        """How wide the legend is, with 0.4 inches a column for a handle and the gaps."""
        return sum(0.4 + max(text_inches(text, 7.5) for _, text in entries[i::columns]) for i in range(columns))

    columns = next(n for n in range(len(entries), 0, -1) if n == 1 or inches(n) < WIDTH - 0.1)
    entries = [e for i in range(columns) for e in entries[i::columns]]  # matplotlib fills column by column
    legend = figure.legend(
        [handle for handle, _ in entries],
        ["-"] * len(entries),  # a label given here is not drawn if it begins with "_"
        loc="outside upper center",
        ncols=columns,
        fontsize=7.5,
        frameon=False,
        handlelength=1.6,
        columnspacing=1.4,
    )
    for text, (_, label) in zip(legend.get_texts(), entries, strict=True):
        text.set(text=label, parse_math=False)


def _legend_entries(
    rows: Sequence[TimelineRow], shown: Sequence[tuple[Sequence[str], int]], style: _Style
) -> list[tuple[Patch | Line2D, str]]:
    entries: list[tuple[Patch | Line2D, str]] = []
    if any(row.ground_truth for row in rows):
        entries.append((Patch(facecolor=GREEN), "ground truth"))
    labels = [t.label for t in rows[0].tracks]
    for k, label in enumerate(labels):
        if any(row.tracks[k].detections for row in rows):
            said = " (height: score)" if style.best[k] > 0 else " (no score above 0)"
            name = "detection" if len(labels) == 1 else fit(label, IN_LEGEND - text_inches(said, 7.5), 7.5)
            entries.append((Patch(facecolor=(_colour(k), 0.55), edgecolor=_colour(k), lw=0.5), name + said))
    if any(t.attention is not None for row in rows for t in row.tracks):
        entries.append((Line2D([], [], color=GREY, lw=0.9), "bottom-up attention"))
    curves = {
        c
        for row, (classes, _) in zip(rows, shown, strict=True)
        for t in row.tracks
        for c in row._curves(t)
        if c in classes
    }
    entries += [
        (Line2D([], [], color=colour, ls=line, lw=1.4), fit(name, IN_LEGEND, 7.5))
        for name, (colour, line) in style.classes.items()
        if name in curves
    ]
    return entries
