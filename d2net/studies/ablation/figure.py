"""The picture of a study: every variant a bar, every training a dot."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from d2net.report.names import fit
from d2net.studies.ablation.table import Row, measures, plus_minus

COLOURS = {"raw": "#8a6d3b", "refined": "#2f6db5"}


def draw(rows: Sequence[Row], name: str, over: str) -> Figure:
    """mAP and F1 of every variant: a bar for the mean, a line for the deviation, a dot for each run; with a legend."""
    shown = [m for m in ("0.5", "f1") if m in measures(rows)]
    several = any(len(row.results) > 1 for row in rows)
    figure = Figure(figsize=(7.0, 1.1 + 0.2 * several + 0.34 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for ax, measure in zip(panels, shown, strict=True):
        for y, row in enumerate(rows):
            mean, deviation = row.summary(measure) or (0.0, None)
            ax.barh(y, mean, height=0.62, color=(COLOURS[row.tcam], 0.3), zorder=2)
            if deviation is not None:
                ax.errorbar(mean, y, xerr=deviation, color=COLOURS[row.tcam], lw=1.2, capsize=2.5, zorder=3)
                values = row.values(measure)
                ax.plot(values, [y] * len(values), "o", ms=2.6, color="#222222", alpha=0.55, mew=0, zorder=4)
            # Outside the axes, where no bar or line crosses it.
            beside = plus_minus((mean, deviation))
            ax.text(1.01, y, beside, va="center", fontsize=7.5, transform=ax.get_yaxis_transform())
        ax.set_xlabel("F1 at IoU 0.5, percent" if measure == "f1" else "mAP at IoU 0.5, percent", fontsize=8.5)
        ax.set_xlim(left=0)
        ax.tick_params(labelsize=7.5, length=2.5, width=0.6)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x", color="#e4e4e4", lw=0.5)
        ax.set_axisbelow(True)
        ax.spines[["top", "right", "left"]].set_visible(False)
    labels = [fit(f"{row.variant.label}, {row.tcam}", 2.2, 8, lines=2) for row in rows]
    panels[0].set_yticks(range(len(rows)), labels, fontsize=8)
    panels[0].invert_yaxis()
    for text in panels[0].get_yticklabels():
        text.set(parse_math=False, linespacing=1.0)
    # Beside the longest of the rest, "Ablation on …; 3 seeds x 7 held-out training subjects".
    title = f"Ablation on {fit(name, 2.2, 9, bold=True)}; {over}"
    figure.suptitle(title, fontsize=9, fontweight="bold").set_parse_math(False)
    if several:
        figure.supxlabel(
            "bars and numbers: mean ± sample deviation over the trainings; dots: each training", fontsize=7.5
        )
    return figure
