"""Signals of sensors in CSV files, at a steady rate, and the statistics of their windows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from d2net.data.statistics import BANDS, shortest, window_statistics
from d2net.errors import InputError
from d2net.features.extract import Features, check_sampling
from d2net.features.table import UNITS, Table
from d2net.words import counted, listed

SUFFIXES = frozenset((".csv", ".tsv"))
_LEAST, _MOST = 0.1, 20_000  # rows a second of a clock whose unit is right
# Columns of numbers that say what is done, by whom or when.
_NO_SENSOR = re.compile(
    r"$|(date)?time|date$|unnamed|(row|index|id|label|class|activity|action|target|annotation|subject|user|person|session)s?"
    r"([ _]?id)?$",
    re.IGNORECASE,
)
_GAP = 1.0  # seconds between rows that are worth a note


@dataclass(frozen=True)
class Columns:
    """What of a CSV file is what.

    Attributes:
        sensors: Names of the columns of each sensor, whose axes they are: acceleration, angular velocity.
        time: Name of the column of the clock; None: there is none.
        unit: Of the clock: ``s``, ``ms``, ``us``, ``ns``; ``date`` for dates with times.
    """

    sensors: tuple[tuple[str, ...], ...]
    time: str | None = None
    unit: str = "s"


def extract_sensor(
    path: Path,
    columns: Columns,
    *,
    rate: float | None = None,
    fps: float = 50.0,
    window: int = 50,
    stride: int = 16,
) -> Features:
    """Statistics of the windows of a recording of sensors: :func:`d2net.data.statistics.window_statistics`.

    The signal is first brought to ``fps`` samples a second: by straight lines between rows, or, from more than twice as
    many rows, by their mean. Empty cells are filled by straight lines too.

    Args:
        path: Of a CSV file with names in its first line.
        columns: Of which sensors, and of the clock; :func:`find_columns` finds them.
        rate: Rows a second; None: measured from the clock.
        fps: Samples a second that the signal is brought to.
        window: Samples of a window, at least ``stride``.
        stride: Samples from one window to the next.

    Returns:
        (T, D) statistics of each sensor after the other, where snippet t stands for samples [stride t, stride (t + 1)).

    Raises:
        InputError: columns that are missing or hold no numbers, a clock that goes back or whose unit cannot be, too
            short a recording.
    """
    check_sampling(fps, window, stride)
    if window < stride:
        raise InputError(f"--window {window} is less than --stride {stride}; windows of sensors may not leave gaps")
    if rate is not None and not 0 < rate <= 1e6:
        raise InputError(f"--rate is {rate:g}; it must be a number above 0, at most 1000000")
    table = Table(path)
    notes: list[str] = []
    names = [name for sensor in columns.sensors for name in sensor]
    signal = np.stack([table.filled(name, notes) for name in names], axis=1)
    if columns.time is None and rate is None:
        raise InputError(
            f"{path}: has no column of times; name it with --time-column, or give the rows a second as --rate"
        )
    if rate is None:
        assert columns.time is not None
        times = table.clock(columns.time, columns.unit, notes)
        times -= times[0]
        steps = np.diff(times)
        usual = steps[steps <= _GAP] if steps.min() <= _GAP else steps
        rate = len(usual) / usual.sum() if usual.sum() > 0 else 0.0
        _check_rate(path, rate, columns)
        if gaps := int((steps > max(_GAP, 5 / rate)).sum()):
            notes.append(f"{counted(gaps, 'gap')} of up to {steps.max():.1f} s between rows, filled by straight lines")
    else:
        times = np.arange(len(signal)) / rate
    duration = float(times[-1] + 1 / rate)
    count = int(duration * fps + 1e-6)
    if count < shortest(window, stride):
        least = shortest(window, stride) / fps
        raise InputError(
            f"{path}: lasts {duration:.2f} s, and a snippet needs {least:.2f}; leave it out, or lower --window"
        )
    if rate < 2 * fps:
        steady = np.stack([np.interp(np.arange(count) / fps, times, column) for column in signal.T], axis=1)
    else:
        # Of each 1 / fps s the mean, as the difference of integrals: what is faster would show as something slower.
        edges = np.minimum((np.arange(count + 1) - 0.5) / fps, times[-1]).clip(0)
        steps = np.diff(times)[:, None] * (signal[1:] + signal[:-1]) / 2
        integral = np.concatenate([np.zeros((1, signal.shape[1])), np.cumsum(steps, axis=0)])
        widths = np.diff(edges)
        steady = np.stack(
            [np.diff(np.interp(edges, times, column)) / np.maximum(widths, 1e-12) for column in integral.T], 1
        )
        steady[widths <= 0] = signal[-1]
    at, values = 0, []
    for sensor in columns.sensors:
        values.append(window_statistics(steady[:, at : at + len(sensor)], rate=fps, window=window, stride=stride))
        at += len(sensor)
    highest = min(rate, fps) / 2
    if highest < BANDS[-1][1]:
        notes.append(
            f"of {min(rate, fps):.4g} rows a second nothing above {highest:.4g} Hz is seen in the bands of energy"
        )
    return Features(np.concatenate(values, axis=1), duration, rate, tuple(notes))


def find_columns(
    path: Path,
    sensors: Sequence[Sequence[str]] = (),
    time: str | None = None,
    unit: str | None = None,
    rate: float | None = None,
) -> Columns:
    """What of a CSV file is what: as given, and the rest found.

    Found are: as the clock, the column that is called ``time``, ``t`` or the like; as sensors, all other columns of
    numbers but ``label``, ``subject``, ``id`` and the like, those that differ in a last x, y or z being one sensor. The
    unit of the clock is said by its name (``time_ms``, ``time (s)``), or is the one in which there are 1 to 2000 rows a
    second.

    Args:
        path: Of the file.
        sensors: Names of the columns of each sensor; empty: found.
        time: Name of the column of the clock; None: found, unless ``rate`` is given.
        unit: Of the clock; None: found.
        rate: Rows a second, where that is known.

    Raises:
        InputError: no such column; none that can be a clock or a sensor; a unit that could be two.
    """
    table = Table(path)
    if unit is not None and unit not in (*UNITS, "date"):
        raise InputError(f"--time-unit {unit}: give {', '.join(UNITS)} or date")
    for name in [*(n for sensor in sensors for n in sensor), *([time] if time else [])]:
        table.check(name)
    chosen = [name for sensor in sensors for name in sensor]
    if len(set(chosen)) < len(chosen):
        raise InputError(f"--columns {','.join(chosen)}: names a column twice")
    if time is None and rate is None:
        likely = [n for n in table.names if re.match(r"(date)?time|t$|t[ _(\[]|seconds$|clock", n.strip().casefold())]
        likely = [n for n in likely if n not in chosen]
        if not likely:
            raise InputError(
                f"{path}: has no column of times by its name ({listed(table.names, 8)}); name it with --time-column, "
                "or give the rows a second as --rate"
            )
        if len(likely) > 1:
            raise InputError(f"{path}: columns {listed(likely)} may all be the time; name it with --time-column")
        time = likely[0]
    if not sensors:
        free = [n for n in table.names if n != time and not _NO_SENSOR.match(n.strip()) and table.is_numeric(n)]
        groups: dict[str, list[str]] = {}
        for name in free:
            stem = re.sub(r"[ _.\-]?[xyz](?=([ _]?[(\[].*)?$)", "", name, flags=re.IGNORECASE)
            groups.setdefault(stem if stem != name else f"{name} alone", []).append(name)
        sensors = list(groups.values())
        if not sensors:
            raise InputError(f"{path}: has no column of numbers beside the time; name some with --columns")
    if time is not None and rate is None and unit is None:
        unit = table.unit(time)
    return Columns(tuple(tuple(sensor) for sensor in sensors), time if rate is None else None, unit or "s")


def _check_rate(path: Path, rate: float, columns: Columns) -> None:
    if not _LEAST <= rate <= _MOST:
        raise InputError(
            f"{path}: {rate:.4g} rows a second, by column '{columns.time}' in {columns.unit}, cannot be; give "
            "d2net features --time-unit s, ms, us or ns, or --rate, the rows a second; or mend the times of this file"
        )
