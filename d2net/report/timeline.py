"""The timeline picture (the paper's Fig. 1 and 5): frames, ground truth, detections and activations over time."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import Patch
from PIL import Image  # matplotlib needs it too

from d2net.errors import InputError

FORMATS = ("png", "pdf", "svg")
MAX_CLASSES = 5  # classes shown of one recording
MAX_LABEL = 28  # letters of a track's name beside its lane

GREEN, BLUE, GREY = "#1b8a5a", "#2f6db5", "#9a9a9a"
TRACK_COLOURS = (BLUE, "#b8455a", "#6f6f6f", "#8a7a1f", "#3f9a9a")  # every lane is labelled too
# After Okabe and Ito: told apart with every kind of colour vision, and none is the green or blue of the bars.
CLASS_COLOURS = ("#d55e00", "#7a4ea3", "#e69f00", "#cc79a7", "#000000", "#56b4e9", "#8c510a")
LINE_STYLES = ("-", "--", ":", "-.")  # the next style each time the colours are used up

WIDTH = 7.0  # inches: the two columns of a paper
LANE, CURVES, FRAMES = 0.36, 0.85, 0.62  # heights in inches: ground truth and one track, activations, frames
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
    """

    label: str
    detections: Sequence[tuple[float, float, str, float]]
    tcam: np.ndarray | None = None
    attention: np.ndarray | None = None


@dataclass(frozen=True)
class TimelineRow:
    """One recording of the picture.

    Attributes:
        name: Written above the recording's block.
        seconds_per_snippet: Seconds from one snippet to the next.
        classes: (C,) names of the columns of every ``tcam``.
        ground_truth: (start s, end s, class name) rows.
        tracks: What is compared; the same labels in the same order in every recording of a picture.
        duration: Length in seconds; the block is longer where a segment or an activation lies past it.
        frames: Images of the recording in order of time, evenly spaced from its beginning to its end.
    """

    name: str
    seconds_per_snippet: float
    classes: Sequence[str]
    ground_truth: Sequence[tuple[float, float, str]]
    tracks: Sequence[Track]
    duration: float = 0.0
    frames: Sequence[Path] = ()

    def shown_classes(self) -> tuple[list[str], int]:
        """The classes to draw, in the order of ``classes``, and how many others there are.

        Those of the ground truth come first, then the detected ones by falling score (as a share of the track's best
        one), up to ``MAX_CLASSES``.
        """
        detected = []
        for track in self.tracks:
            best = max((d[3] for d in track.detections), default=0.0)
            detected += [(d[3] / best if best > 0 else 0.0, d[2]) for d in track.detections]
        detected.sort(key=lambda d: -d[0])
        relevant = list(dict.fromkeys([g[2] for g in self.ground_truth] + [d[1] for d in detected]))
        shown = set(relevant[:MAX_CLASSES])
        return [c for c in self.classes if c in shown], len(relevant) - len(shown)

    def end(self) -> float:
        """Seconds from the beginning to the end of all that is drawn."""
        return max(
            [
                self.duration,
                *(g[1] for g in self.ground_truth),
                *(d[1] for t in self.tracks for d in t.detections),
                *(len(t.tcam) * self.seconds_per_snippet for t in self.tracks if t.tcam is not None),
            ]
        )


def check_picture(path: Path) -> str:
    """The format that the suffix of ``path`` asks for. Raises InputError when pictures cannot be written so."""
    kind = path.suffix.lower().lstrip(".")
    if kind not in FORMATS:
        raise InputError(f"{path}: cannot draw a '{path.suffix}' file; name it .png, .pdf or .svg")
    return kind


def save_figure(path: Path, figure: Figure, dpi: int) -> None:
    """Save in the format of the suffix, whole or not at all. Raises InputError when it cannot be written."""
    content = io.BytesIO()
    # Journals refuse Type 3 fonts, which is what matplotlib embeds by default.
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        figure.savefig(content, format=check_picture(path), dpi=dpi)
    _write(path, content.getvalue())


def draw_timeline(path: Path, rows: Sequence[TimelineRow], *, dpi: int = 200) -> None:
    """Draw recordings below each other and save the picture.

    A recording begins with a row of its frames, if there are any. Then each class has a lane: ground truth as a green
    bar, and below it one row of detections per track, as high as their score (a track's highest score in the whole
    picture fills its row). Under the lanes are the class activations of each track that has them, one colour per class
    in the whole picture (also the floor of its lane), and the bottom-up attention, thin grey. Recordings share one
    time axis unless their lengths differ by more than ``COMMON_AXIS``.

    Args:
        path: Where to save; the suffix says how: .png, .pdf or .svg. Written whole or not at all.
        rows: The recordings, at least one.
        dpi: Dots per inch of a PNG; the picture is 7 inches wide (a paper's two columns).

    Raises:
        InputError: unknown suffix, no row, tracks that differ, arrays that do not fit the classes, an image that cannot
            be read, or a file that cannot be written.
    """
    path = Path(path)
    check_picture(path)
    if not rows:
        raise InputError(f"{path}: there is no recording to draw; choose at least one")
    for row in rows:
        _check(row, [t.label for t in rows[0].tracks])
    save_figure(path, _figure(rows), dpi)


def _check(row: TimelineRow, labels: Sequence[str]) -> None:
    where = f"timeline of '{row.name}'"
    if [t.label for t in row.tracks] != labels:
        raise InputError(f"{where}: tracks are {[t.label for t in row.tracks]}, those of the first row {labels}")
    for track in row.tracks:
        shape = None if track.tcam is None else track.tcam.shape
        if shape is not None and (len(shape) != 2 or shape[1] != len(row.classes) or shape[0] == 0):
            raise InputError(f"{where}: tcam has shape {tuple(shape)}, expected (T, {len(row.classes)}), T > 0")
        if track.attention is not None and (shape is None or track.attention.shape != shape[:1]):
            expected = "none without a tcam" if shape is None else f"({shape[0]},)"
            raise InputError(f"{where}: attention has shape {tuple(track.attention.shape)}, expected {expected}")
    if not row.seconds_per_snippet > 0:
        raise InputError(f"{where}: seconds_per_snippet is {row.seconds_per_snippet}; give a positive number")
    for label in [g[2] for g in row.ground_truth] + [d[2] for t in row.tracks for d in t.detections]:
        if label not in row.classes:
            raise InputError(f"{where}: '{label}' is none of its classes: {', '.join(row.classes)}")
    if not row.end() > 0:
        raise InputError(f"{where}: nothing in it says how long it is; give its duration")


@dataclass(frozen=True)
class _Style:
    """What is the same in the whole picture.

    Attributes:
        classes: (colour, line style) of each class shown.
        best: The highest score of each track.
    """

    classes: dict[str, tuple[str, str]]
    best: Sequence[float]


def _figure(rows: Sequence[TimelineRow]) -> Figure:
    shown = [row.shown_classes() for row in rows]
    names = list(dict.fromkeys(c for classes, _ in shown for c in classes))
    endless = ((colour, line) for line in itertools.cycle(LINE_STYLES) for colour in CLASS_COLOURS)
    tracks = range(len(rows[0].tracks))
    style = _Style(
        classes=dict(zip(names, endless, strict=False)),
        best=[max((d[3] for row in rows for d in row.tracks[k].detections), default=1.0) for k in tracks],
    )
    ends = [row.end() for row in rows]
    common = max(ends) <= COMMON_AXIS * min(ends)

    blocks = [_heights(row, len(classes)) for row, (classes, _) in zip(rows, shown, strict=True)]
    heights = [h for block in blocks for h in block]
    titles = 0.3 * len(rows) + (0.16 * sum(len(b) - 1 for b in blocks) if len(tracks) > 1 else 0)
    figure = Figure(
        figsize=(WIDTH, sum(heights) + titles + 0.8 + (0 if common else 0.25 * (len(rows) - 1))),
        layout=ConstrainedLayoutEngine(h_pad=0.03, w_pad=0.04, hspace=0.0),
    )
    panels = iter(figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
    strips = []
    for row, (classes, hidden), end, block in zip(rows, shown, ends, blocks, strict=True):
        axes = [next(panels) for _ in block]
        limit = max(ends) if common else end
        for ax in axes:
            ax.set_xlim(0, limit)
            ax.tick_params(axis="x", bottom=False, labelbottom=False)
            if limit > end:
                ax.axvspan(end, limit, color="#f1f1f1", lw=0, zorder=0)  # after the end of a shorter recording
        title = row.name + (f"   (+ {hidden} more classes not shown)" if hidden else "")
        axes[0].set_title(title, loc="left", fontsize=8.5, fontweight="bold", pad=3, parse_math=False)
        if row.frames:
            strips.append((axes[0], row.frames, end))
            axes[0].set_axis_off()
        lanes, *curves = axes[bool(row.frames) :]
        _draw_lanes(lanes, row, classes, style, end)
        drawn = [k for k in tracks if row.tracks[k].tcam is not None]
        for ax, k in zip(curves, drawn, strict=True):
            _draw_curves(ax, row, row.tracks[k], classes, style)
            if len(tracks) > 1:
                name = _short(row.tracks[k].label, 80)
                ax.set_title(name, loc="left", fontsize=7.5, color=_colour(k), pad=2, parse_math=False)
        if row is rows[-1] or not common:
            axes[-1].tick_params(axis="x", bottom=True, labelbottom=True, labelsize=7.5, length=2.5, width=0.6)
            axes[-1].spines["bottom"].set(visible=True, linewidth=0.6)
    axes[-1].set_xlabel("time (s)", fontsize=8)
    _draw_legend(figure, rows, style)
    if strips:
        figure.draw_without_rendering()  # the layout says how wide a strip is, and so how many frames fit
        for ax, frames, end in strips:
            _draw_frames(figure, ax, frames, end)
    return figure


def _heights(row: TimelineRow, classes: int) -> list[float]:
    """Inches of a recording's panels: its frames, its lanes, one of curves for each track that has them."""
    lanes = LANE * _lane(len(row.tracks)) * max(classes, 1)
    return [FRAMES] * bool(row.frames) + [lanes] + [CURVES] * sum(t.tcam is not None for t in row.tracks)


def _lane(tracks: int) -> float:
    """Height of a class's lane: one half for the ground truth and one for each track."""
    return 0.5 + 0.5 * tracks


def _colour(track: int) -> str:
    return TRACK_COLOURS[track % len(TRACK_COLOURS)]


def _short(text: str, letters: int) -> str:
    return text if len(text) <= letters else f"{text[: letters - 1]}…"


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
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable image; extract it again or take it out of the folder") from error


def _draw_lanes(ax: Axes, row: TimelineRow, classes: Sequence[str], style: _Style, end: float) -> None:
    """One lane a class, the first on top; in it the ground truth, then each track's detections."""
    n = len(row.tracks)
    height = _lane(n)
    activations = any(t.tcam is not None for t in row.tracks)
    ticks: list[tuple[float, str, dict[str, object]]] = []
    for i, c in enumerate(classes):
        y = height * (len(classes) - 1 - i)
        truth = [(s, e - s) for s, e, label in row.ground_truth if label == c]
        ax.broken_barh(truth, (y + 0.5 * n + 0.08, 0.32), color=GREEN, lw=0.4, zorder=2)
        ticks.append((y + 0.5 if n < 2 else y + 0.5 * n + 0.24, c, {"weight": "bold"} if n > 1 else {}))
        for k, (track, best) in enumerate(zip(row.tracks, style.best, strict=True)):
            floor = y + 0.05 + 0.5 * (n - 1 - k)
            # The floor of the lane ties the class to its curve.
            colour, line = style.classes[c] if activations and k == n - 1 else ("#cccccc", "-")
            ax.plot([0, end], [floor, floor], color=colour, ls=line, lw=1.1 if k == n - 1 else 0.6, zorder=3)
            if n > 1:
                ticks.append((floor + 0.2, _short(track.label, MAX_LABEL), {"color": _colour(k), "size": 7}))
            for s, e, label, score in track.detections:
                if label == c:
                    top = 0.45 * max(score, 0.0) / best if best > 0 else 0.0
                    face, edge = (_colour(k), 0.55), _colour(k)
                    ax.broken_barh([(s, e - s)], (floor, top), facecolor=face, edgecolor=edge, lw=0.5, zorder=2)
    ax.set_ylim(0, height * max(len(classes), 1))
    ax.set_yticks([t[0] for t in ticks], [t[1] for t in ticks], fontsize=7.5)
    for text, (_, _, looks) in zip(ax.get_yticklabels(), ticks, strict=True):
        text.set(parse_math=False, **looks)
    ax.tick_params(axis="y", length=0)
    ax.spines[:].set_visible(False)


def _draw_curves(ax: Axes, row: TimelineRow, track: Track, classes: Sequence[str], style: _Style) -> None:
    assert track.tcam is not None
    seconds = (np.arange(len(track.tcam)) + 0.5) * row.seconds_per_snippet  # the middle of each snippet
    if track.attention is not None:
        ax.plot(seconds, track.attention, color=GREY, lw=0.7, zorder=2)
    for c in classes:
        colour, line = style.classes[c]
        ax.plot(seconds, track.tcam[:, list(row.classes).index(c)], color=colour, ls=line, lw=1.1, zorder=3)
    ax.set_ylim(-0.03, 1.03)
    ax.set_yticks([0, 0.5, 1], ["0", "0.5", "1"], fontsize=7)
    ax.grid(axis="y", color="#e4e4e4", lw=0.5, zorder=0)
    ax.set_axisbelow(True)
    ax.set_ylabel("TCAM", fontsize=7.5)
    ax.tick_params(axis="y", length=2.5, width=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_linewidth(0.6)


def _draw_legend(figure: Figure, rows: Sequence[TimelineRow], style: _Style) -> None:
    tracks = rows[0].tracks
    handles: list[Patch | Line2D] = [Patch(facecolor=GREEN, label="ground truth")]
    for k, track in enumerate(tracks):
        name = "detection" if len(tracks) == 1 else _short(track.label, MAX_LABEL)
        handles.append(
            Patch(facecolor=(_colour(k), 0.55), edgecolor=_colour(k), lw=0.5, label=f"{name} (height: score)")
        )
    everything = [t for row in rows for t in row.tracks]
    if any(t.attention is not None for t in everything):
        handles.append(Line2D([], [], color=GREY, lw=0.9, label="bottom-up attention"))
    if any(t.tcam is not None for t in everything):
        handles += [Line2D([], [], color=c, ls=line, lw=1.4, label=name) for name, (c, line) in style.classes.items()]

    def inches(columns: int) -> float:
        """About how wide the legend is: 0.06 inches a letter, 0.4 for a handle and the gaps."""
        return sum(0.4 + 0.06 * max(len(str(h.get_label())) for h in handles[i::columns]) for i in range(columns))

    columns = next(n for n in range(len(handles), 0, -1) if n == 1 or inches(n) < WIDTH - 0.4)
    legend = figure.legend(
        handles=[h for i in range(columns) for h in handles[i::columns]],  # matplotlib fills column by column
        loc="outside upper center",
        ncols=columns,
        fontsize=7.5,
        frameon=False,
        handlelength=1.6,
        columnspacing=1.4,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _write(path: Path, content: bytes) -> None:
    """Write beside the target and rename, so that a picture is never half written."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            part.write_bytes(content)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); choose a folder that exists and is writable"
        ) from error
