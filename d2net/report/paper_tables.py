"""Tables 1 to 4 of the paper, results published since, and a run's row beside them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

from rich.table import Table
from rich.text import Text

from d2net.errors import InputError
from d2net.evaluation import Evaluation, span
from d2net.reading import parse_json
from d2net.words import NAME, did_you_mean, escaped

__all__ = ["Comparison", "PaperTable", "Row", "compare", "comparison_table", "load_table", "table_for", "table_names"]


@dataclass(frozen=True)
class Row:
    """One method of a table.

    Attributes:
        method: As the paper calls it; the rows marked '+' there have supervision ``strong``.
        reference: Number in the paper's list of references; None for the paper's own row, a later one and a run.
        supervision: ``weak`` (recording-level labels) or ``strong`` (segments); None for a run, as detections do not
            say it.
        features: What the network saw, or None where the paper does not say.
        map: mAP in percent at each ``tiou`` of the table, None where the paper gives none.
        average: Mean mAP over the table's ``average_tiou`` as it was published, or None.
        venue: Where and when a later row was published; None for the paper's rows and a run.
        source: Where the numbers of a later row were read.
    """

    method: str
    reference: int | None
    supervision: str | None
    features: str | None
    map: tuple[float | None, ...]
    average: float | None = None
    venue: str | None = None
    source: str | None = None

    def name(self) -> str:
        """The method with its reference in the paper; one that is not in the paper has its venue and a dagger."""
        if self.venue:
            return f"{self.method} ({self.venue}) †"
        return self.method + (f" [{self.reference}]" if self.reference else "")


@dataclass(frozen=True)
class PaperTable:
    """A table of results.

    Attributes:
        title: Its number in the paper; None where the paper has no results on this dataset.
        dataset: What its methods were evaluated on.
        classes: Action classes of that dataset.
        recordings: Recordings of its test set, by the shortest of the published lists: fewer are a part of it.
        tiou: Temporal IoUs of its columns.
        average_tiou: Those whose mean its last column is; empty: it has none.
        rows: The paper's, in its order; None stands for what it does not print.
        later: Methods published since, by venue; not in the paper.
    """

    title: str | None
    dataset: str
    classes: int
    recordings: int
    tiou: tuple[float, ...]
    average_tiou: tuple[float, ...]
    rows: tuple[Row, ...]
    later: tuple[Row, ...]

    def heading(self) -> str:
        """A line above the table."""
        of = f"{self.title} of the paper" if self.title else "Not in the paper"
        return f"{of}: mAP on {self.dataset}, in percent"

    def footnote(self) -> str:
        """What the dagger of the later rows means, and where their numbers are from."""
        sources = "; ".join(dict.fromkeys(row.source for row in self.later if row.source))
        return f"† not in the paper, published since; the numbers are from {sources}"

    def numbers(self, row: Row) -> tuple[float | None, ...]:
        """What a row has in the columns of this table: mAP by IoU, and the average where the table has one."""
        return (*row.map, row.average) if self.average_tiou else row.map

    def average_name(self) -> str:
        """Heading of the column of averages, where there is one."""
        return f"average {span(self.average_tiou)}"

    @property
    def levels(self) -> tuple[float, ...]:
        """The temporal IoUs at which a run must be evaluated to fill a row."""
        return tuple(sorted({*self.tiou, *self.average_tiou}))


@dataclass(frozen=True)
class Comparison:
    """A run beside a table; ``notes`` say why its numbers cannot be compared with the others."""

    table: PaperTable
    run: Row
    simulated: bool
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dump``: the paper's rows, those published since and the run's, apart."""
        return {
            "table": self.table.title,
            "dataset": self.table.dataset,
            "tiou": list(self.table.tiou),
            "average_tiou": list(self.table.average_tiou),
            "rows": [asdict(row) for row in self.table.rows],
            "later": [asdict(row) for row in self.table.later],
            "run": {**asdict(self.run), "simulated": self.simulated, "notes": list(self.notes)},
        }


def table_names() -> list[str]:
    """Names of the tables, as ``d2net evaluate --compare`` takes them."""
    return list(_read())


def table_for(recipe: str) -> str | None:
    """The table of the data that a recipe is for, by its name; None where there is none."""
    return next((name for name in table_names() if recipe.startswith(name)), None)


def load_table(name: str) -> PaperTable:
    """A table by name. Raises InputError for an unknown one; the message lists the tables."""
    tables = _read()
    if name not in tables:
        hint = did_you_mean(name, tables)
        raise InputError(f"unknown table '{name}'{hint}; there are {', '.join(tables)}")
    table = tables[name]
    levels = len(table["tiou"])

    def row(values: dict[str, Any]) -> Row:
        numbers = values["map"]  # the paper's Table 1 ends at 0.5
        return Row(**{**values, "map": (*numbers, *[None] * (levels - len(numbers)))})

    return PaperTable(
        title=table["title"],
        dataset=table["dataset"],
        classes=table["classes"],
        recordings=table["recordings"],
        tiou=tuple(table["tiou"]),
        average_tiou=tuple(table.get("average_tiou", ())),
        rows=tuple(map(row, table["rows"])),
        later=tuple(map(row, table.get("later", ()))),
    )


def compare(
    table: PaperTable, result: Evaluation, *, run: str, features: str | None, data: str, classes: int
) -> Comparison:
    """Put a run beside a table.

    Args:
        table: From :func:`load_table`.
        result: Evaluated at least at all of ``table.levels``. If its detections list only a part of the recordings, or
            its annotations only a part of the table's, the run's name says how many, and a note says why the numbers
            cannot be compared.
        run: Name of the run.
        features: The features that its network saw; None: not known. If the word "simulated" occurs in this or in
            ``data``, the run's row says "simulated".
        data: Name of what it was evaluated on.
        classes: Number of its classes; a note says so if it is not the table's.
    """
    found = dict(zip(result.tiou, result.map.tolist(), strict=True))
    simulated = any("simulated" in (text or "").lower() for text in (features, data))
    shown = features or "not stated"
    if simulated and "simulated" not in shown.lower():
        shown = f"simulated; {shown}"
    notes = []
    if simulated:
        notes.append("the run's data are simulated: its numbers say nothing about real videos")
    if classes != table.classes:
        notes.append(
            f"the run was evaluated on other data ({data}, {classes} classes) than {table.dataset} "
            f"({table.classes} classes): the numbers cannot be compared"
        )
        run = f"{run}, on {data}"
    coverage = result.coverage
    listed, whole = coverage.judged - len(coverage.unlisted), coverage.judged
    if coverage.unlisted:
        notes.append(
            f"the detections list {listed} of the {whole} recordings of the annotations (a CSV lists only those with "
            "a detection): the numbers cannot be compared"
        )
    if classes == table.classes and coverage.judged < table.recordings:
        whole = table.recordings
        notes.append(
            f"the annotations have {coverage.judged} recordings that count, the test set of {table.dataset} has "
            f"at least {table.recordings}: the numbers cannot be compared"
        )
    if classes == table.classes and coverage.judged > 1.02 * table.recordings:
        run = f"{run} ({coverage.judged} recordings)"
        notes.append(
            f"the annotations have {coverage.judged} recordings that count, more than the test set of {table.dataset}: "
            "those of other subsets among them; the numbers cannot be compared"
        )
    if listed < whole:
        run = f"{run} ({listed} of {whole} recordings)"
    if features is None:
        notes.append("the detections do not say which features they are from; say it with --features")
    row = Row(
        method=run,
        reference=None,
        supervision=None,
        features=shown,
        map=tuple(found[t] for t in table.tiou),
        average=sum(found[t] for t in table.average_tiou) / len(table.average_tiou) if table.average_tiou else None,
    )
    return Comparison(table, row, simulated, tuple(notes))


def comparison_table(comparison: Comparison) -> Table:
    """The paper's rows, those published since and the run's row, with a line between them, for a rich console."""
    table = comparison.table
    shown = Table(
        title=table.heading(),
        title_justify="left",
        caption=Text(table.footnote()) if table.later else None,
        caption_justify="left",
        padding=0,  # so that all columns fit into 80 letters
    )
    for name in ("method", "labels", "features"):  # labels: the supervision
        shown.add_column(name, overflow="fold", width=len(name) if name == "labels" else None)
    for t in table.tiou:
        shown.add_column(f"@{t:g}", justify="right", no_wrap=True)
    if table.average_tiou:
        shown.add_column(table.average_name(), justify="right", width=len("average"))

    def add(row: Row, style: str | None) -> None:
        cells = ["-" if n is None else f"{n:.1f}" for n in table.numbers(row)]
        names = (row.name(), row.supervision or "-", row.features or "-")
        shown.add_row(*(Text(escaped(name, 4 * NAME)) for name in names), *cells)  # Text has no markup
        shown.rows[-1].style = style

    for rows in (table.rows, table.later):
        for row in rows:
            add(row, None)
        shown.add_section()
    add(comparison.run, "bold")
    return shown


def _read() -> dict[str, Any]:
    return parse_json((resources.files(__package__) / "paper_tables.json").read_text(encoding="utf-8"))
