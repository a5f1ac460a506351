"""The report of an ablation study: its table, its settings, the losses of its trainings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from d2net.report.facts import recipe_fact, report_facts
from d2net.report.page import Table, write_report
from d2net.studies.ablation.run import Ablation
from d2net.studies.ablation.table import Row, gain, measures, plus_minus
from d2net.training_log import LOG_NAME, read_log


def write_page(study: Ablation, rows: Sequence[Row], path: Path, command: str = "") -> None:
    """Write ``path``, an HTML page.

    Raises:
        InputError: as :func:`d2net.report.page.write_report`; a log that cannot be read.
    """
    first = rows[0]
    columns = measures(rows)
    compare = "0.5" in columns and len(rows) > 1
    header = ["variant", *({"f1": "F1@0.5", "average": "average"}.get(c, f"mAP@{c}") for c in columns)]
    cells = []
    for row in rows:
        cells.append([row.variant.label, *(plus_minus(row.summary(c)) for c in columns)])
        if compare:
            cells[-1].append("" if row is first else plus_minus(gain(row, first, "0.5"), "+"))
    if compare:
        header.append(f"mAP@0.5 above {first.variant.name}")
    notes = [f"protocol {first.results[0]['protocol']}; {study.over}"]
    if len(first.results) > 1:
        notes.append("mean ± sample deviation over the trainings; the last column over differences of paired trainings")
    notes += [f"{row.variant.name}: {line}" for row in rows for line in row.results[-1].get("said", [])[:1]]
    logs = {}
    for run in reversed(study.runs):  # of each variant, the log of its first training
        log = study.out / run.folder / LOG_NAME
        if log.exists():
            logs[run.variant.name] = read_log(log)
    variants = [f"{row.variant.name}: {' '.join(row.variant.settings) or 'the recipe as it is'}" for row in rows]
    write_report(
        path,
        [],
        title=f"Ablation on {study.dataset.name}",
        tables=[Table(f"Ablation on {study.dataset.name}, in percent", header, cells, notes=notes)],
        logs={row.variant.name: logs[row.variant.name] for row in rows if row.variant.name in logs},
        facts=[
            recipe_fact(study.recipe),
            ("variants", "\n".join(variants)),
            ("trainings", study.over),
            ("data", study.dataset.name),
            *report_facts(command),
        ],
    )
