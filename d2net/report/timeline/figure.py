"""How the panels of all recordings are laid out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from d2net.report.names import fit, plain, text_inches
from d2net.report.timeline.legend import draw_legend
from d2net.report.timeline.panels import draw_curves, draw_frames, draw_lanes
from d2net.report.timeline.rows import TimelineRow, best_scores
from d2net.report.timeline.style import (
    BESIDE,
    CLASS_COLOURS,
    CURVES,
    FRAMES,
    LANE,
    LINE_STYLES,
    WIDTH,
    Style,
    track_colour,
)

# A longest recording more than this many times the shortest one would leave that nothing to see on a common axis.
COMMON_AXIS = 3.0


def timeline_figure(rows: Sequence[TimelineRow], min_score: float = 0.0) -> Figure:
    """The picture of checked rows; ``min_score`` is only said in it, what is below has been taken out before."""
    shown = [row.shown_classes() for row in rows]
    drawn = {c for classes, _ in shown for c in classes}
    names = [c for c in dict.fromkeys(c for row in rows for c in row.classes) if c in drawn]
    endless = ((colour, line) for line in itertools.cycle(LINE_STYLES) for colour in CLASS_COLOURS)
    tracks = range(len(rows[0].tracks))
    truth = any(row.ground_truth for row in rows)
    style = Style(
        classes=dict(zip(names, endless, strict=False)),
        best=best_scores(rows),
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
        draw_lanes(lanes, row, classes, style, end)
        for ax, k in zip(curves, (k for k in tracks if row.tracks[k].tcam is not None), strict=True):
            draw_curves(ax, row, row.tracks[k], classes, style)
            if len(tracks) > 1:
                name = fit(row.tracks[k].label, room, 7.5)
                ax.set_title(name, loc="left", fontsize=7.5, color=track_colour(k), pad=2, parse_math=False)
        if row is rows[-1] or not common:
            axes[-1].tick_params(axis="x", bottom=True, labelbottom=True, labelsize=7.5, length=2.5, width=0.6)
            axes[-1].spines["bottom"].set(visible=True, linewidth=0.6)
    axes[-1].set_xlabel("time (s)", fontsize=8)
    if min_score > 0 and any(best > 0 for best in style.best):
        whose = "the" if len(tracks) == 1 else "each one's"
        said = f"detections from {100 * min_score:g} % of {whose} best score"
        beside = ("axes fraction", axes[-1].xaxis.label)
        axes[-1].annotate(said, (1, 0.5), xycoords=beside, ha="right", va="center", fontsize=7, color="#555555")
    draw_legend(figure, rows, shown, style)
    if strips:
        figure.draw_without_rendering()  # the layout says how wide a strip is, and so how many frames fit
        for ax, frames, end in strips:
            draw_frames(figure, ax, frames, end)
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


def _heights(row: TimelineRow, classes: int, style: Style) -> list[float]:
    """Inches of a recording's panels: its frames, its lanes, one of curves for each track that has them."""
    lanes = LANE * (style.head + 0.5 * len(row.tracks)) * max(classes, 1)
    return [FRAMES] * bool(row.frames) + [lanes] + [CURVES] * sum(t.tcam is not None for t in row.tracks)
