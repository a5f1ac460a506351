"""The legend of the timeline picture."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from d2net.report.names import fit, text_inches
from d2net.report.timeline.rows import TimelineRow
from d2net.report.timeline.style import GREEN, GREY, IN_LEGEND, WIDTH, Style, track_colour


def draw_legend(
    figure: Figure, rows: Sequence[TimelineRow], shown: Sequence[tuple[Sequence[str], int]], style: Style
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
    rows: Sequence[TimelineRow], shown: Sequence[tuple[Sequence[str], int]], style: Style
) -> list[tuple[Patch | Line2D, str]]:
    entries: list[tuple[Patch | Line2D, str]] = []
    if any(row.ground_truth for row in rows):
        entries.append((Patch(facecolor=GREEN), "ground truth"))
    labels = [t.label for t in rows[0].tracks]
    for k, label in enumerate(labels):
        if any(row.tracks[k].detections for row in rows):
            said = " (height: score)" if style.best[k] > 0 else " (no score above 0)"
            name = "detection" if len(labels) == 1 else fit(label, IN_LEGEND - text_inches(said, 7.5), 7.5)
            entries.append((Patch(facecolor=(track_colour(k), 0.55), edgecolor=track_colour(k), lw=0.5), name + said))
    if any(t.attention is not None for row in rows for t in row.tracks):
        entries.append((Line2D([], [], color=GREY, lw=0.9), "bottom-up attention"))
    curves = {
        c
        for row, (classes, _) in zip(rows, shown, strict=True)
        for t in row.tracks
        for c in row.curves(t)
        if c in classes
    }
    entries += [
        (Line2D([], [], color=colour, ls=line, lw=1.4), fit(name, IN_LEGEND, 7.5))
        for name, (colour, line) in style.classes.items()
        if name in curves
    ]
    return entries
