"""Draws docs/losses-hard.png from the committed trainings of docs/studies.md: python benchmarks/draw_losses.py

mAP against temporal IoU for the losses of the paper's Table 3 on the hard recordings of `watch`: people who had no part
in the experiment, the released network, five seeds.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
TRAININGS = ROOT / "benchmarks" / "results" / "studies" / "hard-test-released-runs.csv"
TIOUS = [f"{tiou / 10:g}" for tiou in range(1, 8)]
LOSSES = {
    "cross-entropy": ("cross-entropy", "#8a8a8a"),
    "focal": ("focal", "#b0722c"),
    "dis": ("L_Dis", "#2f6db5"),
    "ds-half": ("L_Dis + L_DS from half-way on", "#1b8a5a"),
}
PANELS = {"raw": "raw TCAM", "refined": "refined with the bottom-up attention"}


def trainings(tcam: str, loss: str) -> np.ndarray:
    """mAP in percent (trainings, tIoUs)."""
    with open(TRAININGS, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (row["tcam"], row["variant"]) == (tcam, loss)]
    return np.array([[float(row[f"map@{tiou}"]) for tiou in TIOUS] for row in rows])


def draw() -> Figure:
    figure = Figure(figsize=(7.0, 3.1), layout="constrained")
    for ax, (tcam, title) in zip(figure.subplots(1, 2, sharey=True), PANELS.items(), strict=True):
        x = [float(tiou) for tiou in TIOUS]
        for loss, (label, colour) in LOSSES.items():
            values = trainings(tcam, loss)
            ax.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.13, lw=0)
            ax.plot(x, values.mean(0), color=colour, lw=1.6, marker="o", ms=3, label=label)
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("temporal IoU", fontsize=8.5)
        ax.tick_params(labelsize=7.5, length=2.5, width=0.6)
        ax.grid(color="#e4e4e4", lw=0.5)
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("mAP, percent", fontsize=8.5)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7.5, frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "losses-hard.png")
    draw().savefig(parser.parse_args().out, dpi=200)


if __name__ == "__main__":
    main()
