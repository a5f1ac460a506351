"""CSV files of signals: columns of numbers, and clocks in whatever unit."""

from __future__ import annotations

import csv
import datetime
import io
import re
from contextlib import suppress
from pathlib import Path

import numpy as np

from d2net.errors import InputError
from d2net.reading import read_text
from d2net.words import counted, did_you_mean, is_number, listed, quoted

UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}  # of a clock, in seconds
_UNIT_NAMES = {"s": "s", "sec": "s", "secs": "s", "seconds": "s", "ms": "ms", "msec": "ms", "milliseconds": "ms"}
_UNIT_NAMES |= {"us": "us", "µs": "us", "microseconds": "us", "ns": "ns", "nanoseconds": "ns"}
_LARGEST = 1e15  # of a signal; its square must be a float32
_SLOWEST, _FASTEST = 1.0, 2000.0  # rows a second that a clock's unit may make


class Table:
    """A CSV file: the names in its first line, and its cells as text, column by column."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = read_text(path)
        first = text.partition("\n")[0]
        self.delimiter = max(",;\t", key=first.count)
        try:
            rows = [row for row in csv.reader(io.StringIO(text), delimiter=self.delimiter, strict=True)]
        except csv.Error as error:
            raise InputError(f"{path}: not valid CSV ({error}); write it again") from error
        rows = [row if row else [""] for row in rows]
        while rows and rows[-1] == [""]:
            rows.pop()
        if len(rows) < 3:
            raise InputError(
                f"{path}: has {counted(max(len(rows) - 1, 0), 'row')} below its first line; give a recording"
            )
        self.names = rows[0]
        if all(_number(cell, self.delimiter) is not None for cell in self.names):
            raise InputError(f"{path}: row 1 holds numbers; write the names of the columns above it")
        for name in self.names:
            if name and self.names.count(name) > 1:
                raise InputError(f"{path}: two columns are called {quoted(name)}; rename one")
        for line, row in enumerate(rows[1:], 2):
            if len(row) != len(self.names):
                raise InputError(
                    f"{path}: row {line} has {counted(len(row), 'cell')}, row 1 {len(self.names)}; mend or remove it"
                )
        self.cells = list(zip(*rows[1:], strict=True))

    def check(self, name: str) -> None:
        if name not in self.names:
            raise InputError(
                f"{self.path}: has no column {quoted(name)}{did_you_mean(name, self.names)}; it has "
                f"{listed(self.names, 12)}"
            )

    def column(self, name: str) -> tuple[str, ...]:
        self.check(name)
        return self.cells[self.names.index(name)]

    def is_numeric(self, name: str) -> bool:
        return any(_number(cell, self.delimiter) is not None for cell in self.column(name)[:100])

    def numbers(self, name: str) -> np.ndarray:
        """Of a column; NaN for an empty cell."""
        cells = self.column(name)
        if self.delimiter != ";" and is_number("".join(cells)):
            with suppress(ValueError):
                values = np.array(cells, np.float64)
                if np.isfinite(values).all():
                    return values
        values = np.empty(len(cells))
        for i, cell in enumerate(cells):
            value = np.nan if cell.strip().casefold() in ("", "nan", "na", "null") else _number(cell, self.delimiter)
            if value is None:
                raise InputError(
                    f"{self.path}: row {i + 2}, column {quoted(name)}: {quoted(cell)} is no number; mend it"
                )
            values[i] = value
        return values

    def filled(self, name: str, notes: list[str]) -> np.ndarray:
        """Of a column, with straight lines for empty cells."""
        values = self.numbers(name)
        if (huge := np.abs(values) > _LARGEST).any():
            row = int(huge.argmax()) + 2
            raise InputError(
                f"{self.path}: row {row}, column {quoted(name)}: {values[row - 2]:g} is no sensor's; mend it"
            )
        empty = np.isnan(values)
        if empty.sum() > len(values) / 2:
            raise InputError(
                f"{self.path}: column {quoted(name)} is empty in {empty.sum()} of {counted(len(values), 'row')}; leave "
                "it out"
            )
        if empty.any():
            where = np.arange(len(values))
            values[empty] = np.interp(where[empty], where[~empty], values[~empty])
            notes.append(f"column {quoted(name)}: {counted(int(empty.sum()), 'empty cell')} filled by straight lines")
        return values

    def clock(self, name: str, unit: str, notes: list[str]) -> np.ndarray:
        """Seconds, which never go back."""
        if unit == "date":
            times = np.array([self._date(i, name, cell) for i, cell in enumerate(self.column(name))])
        else:
            times = self.numbers(name)
            if np.isnan(times).any():
                row = int(np.isnan(times).argmax()) + 2
                raise InputError(f"{self.path}: row {row} has no time in column {quoted(name)}; mend or remove it")
            times = (times - times[0]) * UNITS[unit]
        steps = np.diff(times)
        if (steps < 0).any():
            row = int((steps < 0).argmax()) + 3
            raise InputError(
                f"{self.path}: row {row}: the time in column {quoted(name)} goes back; sort or mend the rows"
            )
        if same := int((steps == 0).sum()):
            notes.append(f"{counted(same, 'row')} with the time of the row before")
        return times

    def unit(self, name: str) -> str:
        """Of a clock, by its name or by the rows a second that it makes."""
        last = re.split(r"[ _(\[\].)]+", name.strip().casefold().rstrip(")]"))[-1]
        if last in _UNIT_NAMES and last != name.strip().casefold():
            return _UNIT_NAMES[last]
        cells = self.column(name)
        if _number(cells[0], self.delimiter) is None:
            self._date(0, name, cells[0])
            return "date"
        times = self.numbers(name)
        step = float(np.nanmean(np.diff(times)))
        for digits, unit in ((9, "s"), (12, "ms"), (15, "us"), (18, "ns")):
            if 10**digits <= times[0] < 4 * 10**digits:  # since 1970
                return unit
        fitting = [u for u, seconds in UNITS.items() if step > 0 and _SLOWEST <= 1 / (step * seconds) <= _FASTEST]
        if len(fitting) != 1:
            raise InputError(
                f"{self.path}: column {quoted(name)} moves by {step:.4g} a row, which may be "
                f"{' or '.join(fitting) or 'no unit'}; say which with --time-unit s, ms, us or ns"
            )
        return fitting[0]

    def _date(self, i: int, name: str, cell: str) -> float:
        try:
            date = datetime.datetime.fromisoformat(cell.strip().replace("Z", "+00:00"))
            return (date if date.tzinfo else date.replace(tzinfo=datetime.timezone.utc)).timestamp()
        except ValueError:
            raise InputError(
                f"{self.path}: row {i + 2}, column {quoted(name)}: {quoted(cell)} is neither a number nor a date as "
                "2026-01-31 12:00:00.000; mend it"
            ) from None


def _number(cell: str, delimiter: str) -> float | None:
    text = cell.strip().replace(",", ".") if delimiter == ";" else cell.strip()
    try:
        value = float(text) if is_number(text) else float("nan")
    except ValueError:
        return None
    return value if np.isfinite(value) else None
