"""CSV as spreadsheets write and read it: one reader and one writer of it, for detections, labels and segments.

A spreadsheet runs a cell that begins with ``=``, ``+``, ``-`` or ``@`` as a formula. So that a name never is one, such
names are written with an apostrophe before them, which the reader takes off again.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from d2net.errors import InputError
from d2net.reading import number, read_text
from d2net.words import did_you_mean, quoted

_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_COMMA_NUMBER = re.compile(r"\s*[-+]?[0-9]+,[0-9]+\s*", re.ASCII)


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        where: The file and the line, for messages.
        line: Number of the line in the file, from 1; of the last one, where a cell runs over several.
        cells: By the name of the column, as they are in the file but for :func:`guarded`.
        decimal_comma: Whether 1,5 may stand for 1.5, since no comma separates the columns.
    """

    where: str
    line: int
    cells: dict[str, str]
    decimal_comma: bool = False

    def text(self, column: str) -> str:
        """A cell without the blanks around it."""
        return self.cells[column].strip()

    def number(self, column: str, way_out: str) -> float:
        """A cell as a finite number. Raises InputError that names file, line and column."""
        cell = self.cells[column]
        if self.decimal_comma and _COMMA_NUMBER.fullmatch(cell):
            cell = cell.replace(",", ".")
        return number(cell, f"{self.where}: {column}", way_out)


@dataclass(frozen=True)
class Table:
    """A CSV file: its rows, and the columns that are there and were not asked for."""

    rows: tuple[Row, ...]
    ignored: tuple[str, ...]


def read_table(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Table:
    """Reads a CSV in UTF-8, with or without BOM, whose first line names the columns, in any order and case.

    Columns are separated by commas, or by semicolons or tabs, as spreadsheets of some languages do; numbers may have a
    decimal comma then. A first line ``sep=;``, which spreadsheets write too, is skipped, as are empty lines.

    Raises:
        InputError: a file that cannot be read, no header, a missing column, one that stands twice or is nearly an
            optional one, a line with more or fewer cells.
    """
    text = read_text(path)
    skipped = 0
    if text[:4].lower() == "sep=":
        text, skipped = text.partition("\n")[2], 1
    delimiter = _delimiter(text, columns)
    lines = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    rows: list[Row] = []
    try:
        header = [cell.strip().lower() for cell in next(lines, [])]
        _check_header(f"{path}: line {skipped + 1}", header, columns, optional)
        for cells in lines:
            if not any(cell.strip() for cell in cells):  # what spreadsheets leave at the end
                continue
            line = lines.line_num + skipped
            where = f"{path}: line {line}"
            if len(cells) != len(header):
                sign = {",": "commas", ";": "semicolons", "\t": "tabs"}[delimiter]
                raise InputError(
                    f"{where}: {len(cells)} cells in {len(header)} columns; quote names that hold {sign}, as "
                    f'"a{delimiter}b"'
                )
            named = {column: unguarded(cell) for column, cell in zip(header, cells, strict=True)}
            rows.append(Row(where, line, named, delimiter != ","))
    except csv.Error as error:
        where = f"{path}: line {lines.line_num + skipped}"
        raise InputError(f"{where}: not valid CSV ({error}); mend the line") from error
    return Table(tuple(rows), tuple(c for c in header if c and c not in (*columns, *optional)))


def write_table(columns: Sequence[str], rows: Iterable[Sequence[str | float]]) -> str:
    """A CSV that :func:`read_table` reads back to the last bit; lines end in CR LF, so that lone ones are quoted."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows([guarded(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
    return text.getvalue()


def guarded(cell: str) -> str:
    """A name that no spreadsheet takes as a formula: with an apostrophe before what could be one."""
    return f"'{cell}" if _FORMULA.match(cell) else cell


def unguarded(cell: str) -> str:
    """The name of which :func:`guarded` made ``cell``."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def _delimiter(text: str, columns: Sequence[str]) -> str:
    """The sign by which most of the columns are found in the first line; a comma where several do."""

    def found(sign: str) -> int:
        try:
            header = next(csv.reader(io.StringIO(text, newline=""), delimiter=sign), [])
        except csv.Error:
            return 0
        return len({cell.strip().lower() for cell in header} & set(columns))

    return max((",", ";", "\t"), key=found)


def _check_header(where: str, header: list[str], columns: Sequence[str], optional: Sequence[str]) -> None:
    known = ",".join(columns) + "".join(f"[,{column}]" for column in optional)
    for column in (*columns, *optional):
        n = header.count(column)
        if n > 1 or (n == 0 and column in columns):
            near = "" if n else did_you_mean(column, [c for c in header if c not in (*columns, *optional)])
            raise InputError(
                f"{where}: {f'{n} columns' if n else 'no column'} '{column}' in {quoted(header)}{near}; the first line "
                f"is {known}, separated by commas"
            )
    for column in optional:
        if column not in header and (near := did_you_mean(column, [c for c in header if c not in columns])):
            raise InputError(
                f"{where}: no column '{column}'{near}; call it '{column}', or what is something else otherwise"
            )
