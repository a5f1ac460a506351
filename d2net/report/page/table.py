"""Tables of a report: text in rows and columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from d2net.evaluation import AVERAGES, LENGTHS, AverageRecall, Evaluation, LengthAnalysis, averages
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


def evaluation_page_table(result: Evaluation, recall: AverageRecall | None = None) -> Table:
    """mAP and the AP of each class at each temporal IoU, in percent, and what the numbers are of.

    Args:
        result: Of the detections.
        recall: Of the same.
    """

    # Their mean is one of the averages that papers print, or a column of its own.
    of_all = ["average"] if set(result.tiou) not in map(set, AVERAGES.values()) else []

    def cells(name: str, values: Sequence[float]) -> list[str]:
        means = [math.fsum(values) / len(values) for _ in of_all] + [*averages(result.tiou, values).values()]
        return [name, *(f"{v:.1f}" for v in (*values, *means))]

    rows = [cells("mAP", result.map.tolist()), *(cells(name, values) for name, values in result.per_class.items())]
    named = [f"average {name}" for name in result.averages]
    return Table(
        title=f"Average precision, protocol {result.protocol}, in percent",
        header=["class", *(f"@{t:g}" for t in result.tiou), *of_all, *named],
        rows=rows,
        strong=0,
        notes=[
            f"F1@0.5 of all detections, whatever their score: {result.f1:.1f}.",
            *([f"{recall.line()}."] if recall else []),
            *result.coverage.lines(),
        ],
    )


def lengths_page_table(lengths: LengthAnalysis) -> Table:
    """mAP_N and recall of the ground truths of each length at each temporal IoU, in percent."""
    levels = [*(f"@{t:g}" for t in lengths.tiou), "average"]
    rows = []
    for i, (name, seconds) in enumerate(zip(LENGTHS, lengths.seconds(), strict=True)):
        n = int(lengths.ground_truth[i])
        numbers = [v for of in (lengths.map_n[i], lengths.recall[i]) for v in (*of, of.mean())]
        rows.append([f"{name} {seconds}".strip(), str(n), *(f"{v:.1f}" if n else "–" for v in numbers)])
    return Table(
        title="By the length of the ground truth, in percent",
        header=["length", "ground truths", *(f"{of}{t}" for of in ("mAP_N ", "recall ") for t in levels)],
        rows=rows,
        notes=[
            "mAP_N (DETAD, Alwassel et al., ECCV 2018) can be compared between lengths, not with mAP: its precision is "
            "that of a class with the mean number of ground truths."
        ],
    )


def comparison_page_table(comparison: Comparison) -> Table:
    """The paper's rows, those published since, which have a dagger, and the run's."""
    table = comparison.table

    def cells(row: Row) -> list[str]:
        numbers = ("–" if n is None else f"{n:.1f}" for n in table.numbers(row))
        return [row.name(), row.supervision or "–", row.features or "–", *numbers]

    rows = [cells(row) for row in [*table.rows, *table.later, comparison.run]]
    return Table(
        title=table.heading(),
        header=[
            "method",
            "supervision",
            "features",
            *(f"@{t:g}" for t in table.tiou),
            *([table.average_name()] if table.average_tiou else []),
        ],
        rows=rows,
        strong=len(rows) - 1,
        notes=[table.footnote(), *comparison.notes],
        text_columns=3,
    )
