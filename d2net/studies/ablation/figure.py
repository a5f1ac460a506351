"""The picture of a study: every variant two bars, of its raw and its refined TCAM, and every training a dot."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from d2net.report.names import fit
from d2net.studies.ablation.table import Row, measures, plus_minus

COLOURS = {"raw": "#b0722c", "refined": "#2f6db5"}
HEIGHT = 0.36  # of a bar; variants are 1 apart


def draw(rows: Sequence[Row], name: str, over: str) -> Figure:
    """mAP and F1 of every row: a bar for the mean, a line for the deviation, a dot for each run; with a legend."""
    shown = [m for m in ("0.5", "f1") if m in measures(rows)]
    several = any(len(row.results) > 1 for row in rows)
    tcams = list(dict.fromkeys(row.tcam for row in rows))
    variants = list(dict.fromkeys(row.variant for row in rows))
    figure = Figure(figsize=(7.0, 1.4 + 0.2 * several + 0.34 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for ax, measure in zip(panels, shown, strict=True):
        bars = {}
        for row in rows:
            mean, deviation = row.summary(measure) or (0.0, None)
            y = variants.index(row.variant) + (tcams.index(row.tcam) - (len(tcams) - 1) / 2) * HEIGHT
            colour = COLOURS[row.tcam]
            bars[row.tcam] = ax.barh(y, mean, height=HEIGHT - 0.04, color=(colour, 0.35), zorder=2)
            if deviation is not None:
                ax.errorbar(mean, y, xerr=deviation, color=colour, lw=1.2, capsize=2, zorder=3)
                values = row.values(measure)
                ax.plot(values, [y] * len(values), "o", ms=2.2, color="#222222", alpha=0.45, mew=0, zorder=4)
            # Outside the axes, where no bar or line crosses it.
            beside = plus_minus((mean, deviation))
            ax.text(1.01, y, beside, va="center", fontsize=7, color=colour, transform=ax.get_yaxis_transform())
        ax.set_xlabel("F1 at IoU 0.5, percent" if measure == "f1" else "mAP at IoU 0.5, percent", fontsize=8.5)
        ax.set_xlim(left=0)
        ax.tick_params(labelsize=7.5, length=2.5, width=0.6)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x", color="#e4e4e4", lw=0.5)
        ax.set_axisbelow(True)
        ax.spines[["top", "right", "left"]].set_visible(False)
    labels = [fit(variant.label, 2.2, 8, lines=2) for variant in variants]
    panels[0].set_yticks(range(len(variants)), labels, fontsize=8)
    panels[0].invert_yaxis()
    for text in panels[0].get_yticklabels():
        text.set(parse_math=False, linespacing=1.0)
    names = {"raw": "raw TCAM", "refined": "refined with the bottom-up attention"}
    handles = [bars[tcam] for tcam in tcams]
    figure.legend(
        handles,
        [names[tcam] for tcam in tcams],
        loc="outside lower center",
        ncols=2,
        fontsize=7.5,
        frameon=False,
        title="bars and numbers: mean ± sample deviation over the trainings; dots: each training" if several else None,
        title_fontsize=7.5,
    )
    # Beside the longest of the rest, "Ablation on …; 3 seeds x 7 held-out training subjects".
    title = f"Ablation on {fit(name, 2.2, 9, bold=True)}; {over}"
    figure.suptitle(title, fontsize=9, fontweight="bold").set_parse_math(False)
    return figure
