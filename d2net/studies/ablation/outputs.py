"""Writes the results of a study: a CSV, a JSON and the picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from d2net.files import locked, write_whole
from d2net.report.names import fonts_for
from d2net.report.pictures import save_figure
from d2net.studies.ablation.figure import draw
from d2net.studies.ablation.judging import TCAMS
from d2net.studies.ablation.results import write_json
from d2net.studies.ablation.run import Ablation
from d2net.studies.ablation.table import Row, baseline, difference, measures


def write_tables(study: Ablation, rows: Sequence[Row]) -> list[Path]:
    """Write ``ablation.csv``, ``ablation.json`` and ``ablation.png``; returns their paths.

    Raises:
        InputError: a file cannot be written.
    """
    columns = measures(rows)
    names = [f"map@{c}" if c[0].isdigit() else c for c in columns]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["dataset", "variant", "settings", "tcam", "runs", *(f"{n}_{s}" for n in names for s in ("mean", "deviation"))]
    )
    for row in rows:
        numbers = [x for c in columns for x in row.summary(c) or (None, None)]
        cells = ["" if x is None else f"{x:.4f}" for x in numbers]
        writer.writerow(
            [study.dataset.name, row.variant.name, " ".join(row.variant.settings), row.tcam, len(row.results), *cells]
        )
    table = {
        "dataset": study.dataset.name,
        "over": study.over,
        "recipe": study.recipe.to_dict(),
        "variants": [
            {
                "name": variant.name,
                "label": variant.label,
                "settings": list(variant.settings),
                **{row.tcam: _summary(row, rows, columns, names) for row in rows if row.variant is variant},
                "runs": [
                    {k: v for k, v in r.items() if k in ("seed", "held_out_subjects", *TCAMS)}
                    for r in next(row for row in rows if row.variant is variant).results
                ],
            }
            for variant in study.variants
        ],
    }
    paths = [study.out / f"ablation.{suffix}" for suffix in ("csv", "json", "png")]
    with locked(study.out), fonts_for([study.dataset.name, *(row.variant.label for row in rows)]):
        write_whole(paths[0], text.getvalue())
        write_json(paths[1], table)
        save_figure(paths[2], draw(rows, study.dataset.name, study.over), 200)
    return paths


def _summary(row: Row, rows: Sequence[Row], columns: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """Means and deviations, and the differences from the first variant with their intervals."""
    first = baseline(row, rows)
    above = {n: difference(row, first, c) for n, c in zip(names, columns, strict=True)} if row is not first else {}
    return {
        "mean_and_deviation": {n: row.summary(c) for n, c in zip(names, columns, strict=True)},
        "above_first": {n: {**asdict(d), "settled": d.settled} for n, d in above.items() if d is not None},
        "false_positives": {r: dict(zip(("mean", "runs"), row.false_positives(r), strict=True)) for r in _recalls(row)},
    }


def _recalls(row: Row) -> list[str]:
    return list(row.results[0][row.tcam]["false_positives"])
