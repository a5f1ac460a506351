"""The timeline picture (the paper's Fig. 5): ground truth, detections and activations over time."""

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
from matplotlib.patches import Patch

from d2net.errors import InputError

FORMATS = ("png", "pdf", "svg")
MAX_CLASSES = 5  # classes shown of one recording

GREEN, BLUE, GREY = "#1b8a5a", "#2f6db5", "#9a9a9a"
# After Okabe and Ito: told apart with every kind of colour vision, and none is the green or blue of the bars.
CLASS_COLOURS = ("#d55e00", "#7a4ea3", "#e69f00", "#cc79a7", "#000000", "#56b4e9", "#8c510a")
LINE_STYLES = ("-", "--", ":", "-.")  # the next style each time the colours are used up


@dataclass(frozen=True)
class TimelineRow:
    """One recording of the picture.

    Attributes:
        name: Written above the recording's block.
        seconds_per_snippet: Seconds from one snippet to the next.
        classes: (C,) names of the columns of ``tcam``.
        tcam: (T, C) temporal class activation map, in [0, 1].
        attention: (T,) bottom-up attention in [0, 1], or None.
        ground_truth: (start s, end s, class name) rows.
        detections: (start s, end s, class name, score) rows.
    """

    name: str
    seconds_per_snippet: float
    classes: Sequence[str]
    tcam: np.ndarray
    attention: np.ndarray | None
    ground_truth: Sequence[tuple[float, float, str]]
    detections: Sequence[tuple[float, float, str, float]]

    def shown_classes(self) -> tuple[list[str], int]:
        """The classes to draw, in the order of ``classes``, and how many others there are.

        Those of the ground truth come first, then the detected ones by falling best score, up to ``MAX_CLASSES``.
        """
        best = sorted(self.detections, key=lambda d: -d[3])
        relevant = list(dict.fromkeys([g[2] for g in self.ground_truth] + [d[2] for d in best]))
        shown = set(relevant[:MAX_CLASSES])
        return [c for c in self.classes if c in shown], len(relevant) - len(shown)


def draw_timeline(path: Path, rows: Sequence[TimelineRow], *, dpi: int = 200) -> None:
    """Draw recordings below each other on one time axis and save the picture.

    Each recording has one lane per class: ground truth as a green bar, and below it the detections in blue, as high
    as their score (the highest score of the whole picture fills the lane). Under the lanes are the class activations,
    one colour per class in the whole picture (also the floor of its lanes), and the bottom-up attention, thin grey.

    Args:
        path: Where to save; the suffix says how: .png, .pdf or .svg. Written whole or not at all.
        rows: The recordings, at least one.
        dpi: Dots per inch of a PNG; the picture is 7 inches wide (a paper's two columns).

    Raises:
        InputError: unknown suffix, no row, arrays that do not fit the classes, or the file cannot be written.
    """
    path = Path(path)
    kind = path.suffix.lower().lstrip(".")
    if kind not in FORMATS:
        raise InputError(f"{path}: cannot draw a '{path.suffix}' file; name it .png, .pdf or .svg")
    if not rows:
        raise InputError(f"{path}: there is no recording to draw; choose at least one")
    for row in rows:
        _check(row)
    figure = _figure(rows)
    content = io.BytesIO()
    # Journals refuse Type 3 fonts, which is what matplotlib embeds by default.
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        figure.savefig(content, format=kind, dpi=dpi)
    _write(path, content.getvalue())


def _check(row: TimelineRow) -> None:
    if row.tcam.ndim != 2 or row.tcam.shape[1] != len(row.classes) or len(row.tcam) == 0:
        raise InputError(
            f"timeline of '{row.name}': tcam has shape {tuple(row.tcam.shape)}, expected (T, {len(row.classes)}), T > 0"
        )
    if row.attention is not None and row.attention.shape != (len(row.tcam),):
        raise InputError(
            f"timeline of '{row.name}': attention has shape {tuple(row.attention.shape)}, expected ({len(row.tcam)},)"
        )
    if not row.seconds_per_snippet > 0:
        raise InputError(
            f"timeline of '{row.name}': seconds_per_snippet is {row.seconds_per_snippet}; give a positive number"
        )
    for label in [g[2] for g in row.ground_truth] + [d[2] for d in row.detections]:
        if label not in row.classes:
            raise InputError(f"timeline of '{row.name}': '{label}' is none of its classes: {', '.join(row.classes)}")


def _figure(rows: Sequence[TimelineRow]) -> Figure:
    shown = [row.shown_classes() for row in rows]
    names = list(dict.fromkeys(c for classes, _ in shown for c in classes))
    endless = ((colour, line) for line in itertools.cycle(LINE_STYLES) for colour in CLASS_COLOURS)
    styles = dict(zip(names, endless, strict=False))
    best = max((d[3] for row in rows for d in row.detections), default=1.0)
    ends = [
        max(
            [
                len(row.tcam) * row.seconds_per_snippet,
                *(g[1] for g in row.ground_truth),
                *(d[1] for d in row.detections),
            ]
        )
        for row in rows
    ]

    heights = [h for classes, _ in shown for h in (0.36 * max(len(classes), 1), 0.85)]
    figure = Figure(
        figsize=(7.0, sum(heights) + 0.3 * len(rows) + 0.8),
        layout=ConstrainedLayoutEngine(h_pad=0.03, w_pad=0.04, hspace=0.0),
    )
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for i, (row, (classes, hidden), end) in enumerate(zip(rows, shown, ends, strict=True)):
        lanes, curves = axes[2 * i], axes[2 * i + 1]
        title = row.name + (f"   (+ {hidden} more classes not shown)" if hidden else "")
        lanes.set_title(title, loc="left", fontsize=8.5, fontweight="bold", pad=3, parse_math=False)
        _draw_lanes(lanes, row, classes, styles, best, end)
        _draw_curves(curves, row, classes, styles)
        for ax in (lanes, curves):
            ax.axvspan(end, max(ends), color="#f1f1f1", lw=0, zorder=0)  # after the end of a shorter recording
    axes[0].set_xlim(0, max(ends))
    axes[-1].set_xlabel("time (s)", fontsize=8)
    axes[-1].tick_params(axis="x", bottom=True, labelbottom=True, labelsize=7.5)
    _draw_legend(figure, rows, styles)
    return figure


def _draw_lanes(
    ax: Axes,
    row: TimelineRow,
    classes: Sequence[str],
    styles: dict[str, tuple[str, str]],
    best: float,
    end: float,
) -> None:
    """One lane a class, the first on top: [0.58, 0.9] of it is ground truth, [0.05, 0.5] detections."""
    base = {c: len(classes) - 1 - i for i, c in enumerate(classes)}
    for c, y in base.items():
        truth = [(s, e - s) for s, e, label in row.ground_truth if label == c]
        ax.broken_barh(truth, (y + 0.58, 0.32), color=GREEN, lw=0.4, zorder=2)
        colour, line = styles[c]  # the lane's floor ties it to its curve
        ax.plot([0, end], [y + 0.05, y + 0.05], color=colour, ls=line, lw=1.1, zorder=3)
        for s, e, label, score in row.detections:
            if label == c:
                height = 0.45 * max(score, 0.0) / best if best > 0 else 0.0
                ax.broken_barh(
                    [(s, e - s)], (y + 0.05, height), facecolor=(BLUE, 0.55), edgecolor=BLUE, lw=0.5, zorder=2
                )
    ax.set_ylim(0, max(len(classes), 1))
    ax.set_yticks([y + 0.5 for y in base.values()], list(base), fontsize=7.5)
    for text in ax.get_yticklabels():
        text.set_parse_math(False)
    ax.tick_params(length=0, labelbottom=False)
    ax.spines[:].set_visible(False)


def _draw_curves(ax: Axes, row: TimelineRow, classes: Sequence[str], styles: dict[str, tuple[str, str]]) -> None:
    seconds = (np.arange(len(row.tcam)) + 0.5) * row.seconds_per_snippet  # the middle of each snippet
    if row.attention is not None:
        ax.plot(seconds, row.attention, color=GREY, lw=0.7, zorder=2)
    for c in classes:
        colour, line = styles[c]
        ax.plot(seconds, row.tcam[:, list(row.classes).index(c)], color=colour, ls=line, lw=1.1, zorder=3)
    ax.set_ylim(-0.03, 1.03)
    ax.set_yticks([0, 0.5, 1], ["0", "0.5", "1"], fontsize=7)
    ax.grid(axis="y", color="#e4e4e4", lw=0.5, zorder=0)
    ax.set_axisbelow(True)
    ax.set_ylabel("TCAM", fontsize=7.5)
    ax.tick_params(axis="x", bottom=False, labelbottom=False)
    ax.tick_params(length=2.5, width=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_linewidth(0.6)


def _draw_legend(figure: Figure, rows: Sequence[TimelineRow], styles: dict[str, tuple[str, str]]) -> None:
    handles: list[Patch | Line2D] = [
        Patch(facecolor=GREEN, label="ground truth"),
        Patch(facecolor=(BLUE, 0.55), edgecolor=BLUE, lw=0.5, label="detection (height: score)"),
    ]
    if any(row.attention is not None for row in rows):
        handles.append(Line2D([], [], color=GREY, lw=0.9, label="bottom-up attention"))
    handles += [Line2D([], [], color=c, ls=line, lw=1.4, label=name) for name, (c, line) in styles.items()]

    def inches(columns: int) -> float:
        """About how wide the legend is: 0.06 inches a letter, 0.4 for a handle and the gaps."""
        return sum(0.4 + 0.06 * max(len(str(h.get_label())) for h in handles[i::columns]) for i in range(columns))

    columns = next(n for n in range(len(handles), 0, -1) if n == 1 or inches(n) < 6.6)
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
