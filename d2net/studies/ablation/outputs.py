"""Writes the results of a study: a CSV, a JSON and the picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from d2net.files import locked, write_whole
from d2net.report.names import fonts_for
from d2net.report.pictures import save_figure
from d2net.studies.ablation.figure import draw
from d2net.studies.ablation.results import write_json
from d2net.studies.ablation.run import Ablation
from d2net.studies.ablation.table import Row, gain, measures


def write_tables(study: Ablation, rows: Sequence[Row]) -> list[Path]:
    """Write ``ablation.csv``, ``ablation.json`` and ``ablation.png``; returns their paths.

    Raises:
        InputError: a file cannot be written.
    """
    columns = measures(rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [c if c in ("average", "f1") else f"map@{c}" for c in columns]
    writer.writerow(
        ["dataset", "variant", "settings", "runs", *(f"{n}_{s}" for n in names for s in ("mean", "deviation"))]
    )
    for row in rows:
        numbers = [x for c in columns for x in row.summary(c)]
        cells = ["" if x is None else f"{x:.4f}" for x in numbers]
        writer.writerow(
            [study.dataset.name, row.variant.name, " ".join(row.variant.settings), len(row.results), *cells]
        )
    table = {
        "dataset": study.dataset.name,
        "over": study.over,
        "recipe": study.recipe.to_dict(),
        "variants": [
            {
                "name": row.variant.name,
                "label": row.variant.label,
                "settings": list(row.variant.settings),
                "mean_and_deviation": {n: row.summary(c) for n, c in zip(names, columns, strict=True)},
                "gain_over_first_map@0.5": gain(row, rows[0], "0.5") if "0.5" in columns else None,
                "runs": [{k: v for k, v in r.items() if k not in ("dataset", "settings")} for r in row.results],
            }
            for row in rows
        ],
    }
    paths = [study.out / f"ablation.{suffix}" for suffix in ("csv", "json", "png")]
    with locked(study.out), fonts_for([study.dataset.name, *(row.variant.label for row in rows)]):
        write_whole(paths[0], text.getvalue())
        write_json(paths[1], table)
        save_figure(paths[2], draw(rows, study.dataset.name, study.over), 200)
    return paths
