"""Writes the results of a study: the table and every training as CSV, both as JSON, and the picture."""

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

TABLES = ("ablation.csv", "ablation-runs.csv", "ablation.json", "ablation.png")


def write_tables(study: Ablation, rows: Sequence[Row]) -> list[Path]:
    """Write ``ablation.csv`` (the table), ``ablation-runs.csv`` (a line for each training and TCAM), ``ablation.json``
    (both, and the differences) and ``ablation.png``; returns their paths.

    Raises:
        InputError: a file cannot be written.
    """
    columns = measures(rows)
    names = [f"map@{c}" if c[0].isdigit() else c for c in columns]
    header = ["dataset", "variant", "settings", "tcam", "runs"]
    summary = [[*header, *(f"{n}_{s}" for n in names for s in ("mean", "deviation"))]]
    each = [["dataset", "variant", "seed", "held_out_subjects", "tcam", "detections", *names]]
    for row in rows:
        of = row.variant
        numbers = [x for c in columns for x in row.summary(c) or (None, None)]
        first = [study.dataset.name, of.name, " ".join(of.settings), row.tcam, str(len(row.results))]
        summary.append([*first, *map(_cell, numbers)])
        for result in row.results:
            found = result[row.tcam]
            people = " ".join(map(str, result["held_out_subjects"]))
            values = [found["map"][c] if c in found["map"] else found[c] for c in columns]
            which = [study.dataset.name, of.name, str(result["seed"]), people, row.tcam, str(found["detections"])]
            each.append([*which, *map(_cell, values)])
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
                "runs": [_run(r) for r in next(row for row in rows if row.variant is variant).results],
            }
            for variant in study.variants
        ],
    }
    paths = [study.out / name for name in TABLES]
    with locked(study.out), fonts_for([study.dataset.name, *(row.variant.label for row in rows)]):
        write_whole(paths[0], _csv(summary))
        write_whole(paths[1], _csv(each))
        write_json(paths[2], table)
        save_figure(paths[3], draw(rows, study.dataset.name, study.over), 200)
    return paths


def _csv(lines: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def _cell(x: float | None) -> str:
    return "" if x is None else f"{x:.4f}"


def _run(result: dict[str, Any]) -> dict[str, Any]:
    """One training without what its own result file says at length."""
    long = ("per_class", "coverage", "said")
    found: dict[str, Any] = {tcam: {k: v for k, v in result[tcam].items() if k not in long} for tcam in TCAMS}
    return {"seed": result["seed"], "held_out_subjects": result["held_out_subjects"], **found}


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
