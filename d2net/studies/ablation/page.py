"""The report of an ablation study: its table, its settings, the losses of its trainings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from d2net.report.facts import recipe_fact, report_facts
from d2net.report.page import Table, write_report
from d2net.studies.ablation.run import Ablation
from d2net.studies.ablation.table import Row
from d2net.studies.ablation.tables import tables_of
from d2net.training_log import LOG_NAME, read_log


def write_page(study: Ablation, rows: Sequence[Row], path: Path, command: str = "") -> None:
    """Write ``path``, an HTML page.

    Raises:
        InputError: as :func:`d2net.report.page.write_report`; a log that cannot be read.
    """
    printed = tables_of(study, rows)
    tables = [Table(t.title, t.header, t.cells, notes=t.notes, text_columns=2) for t in printed if t.cells]
    raw = [row for row in rows if row.tcam == "raw"]  # one row a variant
    said = [f"{t.title}: {note}" for t in printed if not t.cells for note in t.notes]
    said += [f"{row.variant.name}, raw: {line}" for row in raw for line in row.results[-1]["raw"]["said"][:1]]
    tables[0] = replace(tables[0], notes=[*tables[0].notes, *said])
    logs = {}
    for run in reversed(study.runs):  # of each variant, the log of its first training
        log = study.out / run.folder / LOG_NAME
        if log.exists():
            logs[run.variant.name] = read_log(log)
    variants = [f"{row.variant.name}: {' '.join(row.variant.settings) or 'the recipe as it is'}" for row in raw]
    write_report(
        path,
        [],
        title=f"Ablation on {study.dataset.name}",
        tables=tables,
        logs={row.variant.name: logs[row.variant.name] for row in raw if row.variant.name in logs},
        facts=[
            recipe_fact(study.recipe),
            ("variants", "\n".join(variants)),
            ("trainings", study.over),
            ("data", study.dataset.name),
            *report_facts(command),
        ],
    )
