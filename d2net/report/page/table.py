"""Tables of a report: text in rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from d2net.evaluation import Evaluation
from d2net.report.paper_tables import Comparison, Row


@dataclass(frozen=True)
class Table:
    """A table of the page, all of it plain text.

    Attributes:
        title: Its heading.
        header: Of each column.
        rows: Cells, as many as the header has; the first of a row is its name, the others are aligned as numbers.
        strong: Index of the row that stands out, or None.
        notes: Sentences below it.
        text_columns: How many columns from the left are text.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: int | None = None
    notes: Sequence[str] = ()
    text_columns: int = 1


def evaluation_page_table(result: Evaluation) -> Table:
    """mAP and the AP of each class at each temporal IoU, in percent, and what the numbers are of."""
    rows = [["mAP", *(f"{v:.1f}" for v in (*result.map, result.average))]]
    for name, values in result.per_class.items():
        rows.append([name, *(f"{v:.1f}" for v in (*values, sum(values) / len(values)))])
    return Table(
        title=f"Average precision, protocol {result.protocol}, in percent",
        header=["class", *(f"@{t:g}" for t in result.tiou), "average"],
        rows=rows,
        strong=0,
        notes=[f"F1@0.5 of all detections, whatever their score: {result.f1:.1f}.", *result.coverage.lines()],
    )


def comparison_page_table(comparison: Comparison) -> Table:
    """The paper's rows, and the run's below them."""
    table = comparison.table
    header = ["method", "supervision", "features", *(f"@{t:g}" for t in table.tiou)]
    averaged = bool(table.average_tiou)

    def cells(row: Row) -> list[str]:
        numbers = [*row.map, *([row.average] if averaged else [])]
        method = row.method + (f" [{row.reference}]" if row.reference else "")
        return [
            method,
            row.supervision or "–",
            row.features or "–",
            *("–" if n is None else f"{n:.1f}" for n in numbers),
        ]

    rows = [cells(row) for row in [*table.rows, comparison.run]]
    return Table(
        title=f"{table.title} of the paper: mAP on {table.dataset}, in percent",
        header=[*header, *(["average"] if averaged else [])],
        rows=rows,
        strong=len(rows) - 1,
        notes=comparison.notes,
        text_columns=3,
    )
