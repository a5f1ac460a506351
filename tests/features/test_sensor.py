"""Sensors' CSV files: the watch dataset's statistics, by whatever clock; what cannot be read is named with its row."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from d2net.data.statistics import window_statistics
from d2net.errors import InputError
from d2net.features import Columns, extract_sensor, find_columns, sensor_method

NAMES = ("acc_x", "acc_y", "acc_z", "gyr_x", "gyr_y", "gyr_z")
SENSORS = (NAMES[:3], NAMES[3:])


def motion(rows: int = 500, rate: float = 50.0) -> np.ndarray:
    """Slow enough that straight lines between rows say what it is."""
    t = np.arange(rows)[:, None] / rate
    return np.sin(2 * np.pi * np.array([0.3, 0.5, 0.7, 0.4, 0.6, 0.2]) * t + np.arange(6)) * [9, 3, 2, 1, 2, 3]


def table(path: Path, signal: np.ndarray, time: list | None = None, names: tuple = NAMES, clock: str = "time") -> Path:
    rows = [",".join([*([clock] if time is not None else []), *names])]
    for i, values in enumerate(signal):
        rows.append(",".join([*([str(time[i])] if time is not None else []), *(repr(float(v)) for v in values)]))
    path.write_text("\n".join(rows) + "\n")
    return path


def statistics(signal: np.ndarray, **options: float) -> np.ndarray:
    options = {"rate": 50, "window": 50, "stride": 16} | options
    return np.concatenate([window_statistics(signal[:, at : at + 3], **options) for at in (0, 3)], axis=1)


def test_as_the_watch_dataset_has_them(tmp_path: Path) -> None:
    signal = motion()
    found = extract_sensor(table(tmp_path / "a.csv", signal), Columns(SENSORS), rate=50)
    np.testing.assert_allclose(found.values, statistics(signal), rtol=1e-5, atol=1e-5)
    assert found.values.shape == (31, 96) and found.duration == 10 and found.rate == 50 and found.notes == ()


def dates(rows: int) -> list[str]:
    start = datetime.datetime(2026, 3, 1, 23, 59, 58)
    return [str(start + datetime.timedelta(milliseconds=20 * i)) for i in range(rows)]


CLOCKS: dict[str, tuple[str, Callable[[int], list], str]] = {
    "seconds": ("time", lambda n: [f"{0.02 * i:.2f}" for i in range(n)], "s"),
    "milliseconds": ("time", lambda n: [20 * i for i in range(n)], "ms"),
    "microseconds": ("t", lambda n: [20_000 * i for i in range(n)], "us"),
    "nanoseconds": ("timestamp", lambda n: [20_000_000 * i for i in range(n)], "ns"),
    "since 1970 in s": ("Timestamp", lambda n: [f"{1_700_000_000 + 0.02 * i:.2f}" for i in range(n)], "s"),
    "since 1970 in ms": ("timestamp", lambda n: [1_700_000_000_000 + 20 * i for i in range(n)], "ms"),
    "since 1970 in us": ("time", lambda n: [1_700_000_000_000_000 + 20_000 * i for i in range(n)], "us"),
    "since 1970 in ns": ("time", lambda n: [1_700_000_000_000_000_000 + 20_000_000 * i for i in range(n)], "ns"),
    "by its name": ("time_ms", lambda n: [20 * i for i in range(n)], "ms"),
    "by its name in brackets": ("Time (s)", lambda n: [0.02 * i for i in range(n)], "s"),
    "dates": ("datetime", dates, "date"),
}


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_clock_is_found_and_its_unit(tmp_path: Path, clock: str) -> None:
    name, make, unit = CLOCKS[clock]
    signal = motion()
    path = table(tmp_path / "a.csv", signal, make(500), clock=name)
    columns = find_columns(path)
    assert columns == Columns(SENSORS, name, unit)
    found = extract_sensor(path, columns)
    assert found.rate == pytest.approx(50, rel=1e-6) and found.duration == pytest.approx(10, rel=1e-5)
    np.testing.assert_allclose(found.values, statistics(signal), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "step", "message"),
    [
        ("time", 0.8, "moves by 0.8 a row, which may be s or ms; say which with --time-unit"),
        ("time", 800, "which may be ms or us"),
        ("time", 1e-5, "which may be no unit"),
        ("time", 0, "which may be no unit"),
    ],
)
def test_a_unit_that_is_not_clear_is_asked_for(tmp_path: Path, name: str, step: float, message: str) -> None:
    path = table(tmp_path / "a.csv", motion(), [step * i for i in range(500)], clock=name)
    with pytest.raises(InputError, match=message):
        find_columns(path)
    assert find_columns(path, unit="s").unit == "s"


def test_a_unit_that_cannot_be(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", motion(), [20 * i for i in range(500)])
    with pytest.raises(InputError, match=r"a.csv: 0.05 rows a second, by column 'time' in s, cannot be; .*--time-unit"):
        extract_sensor(path, Columns(SENSORS, "time", "s"))


@pytest.mark.parametrize("rate", [10.0, 33.3, 80.0, 200.0])
def test_another_rate_is_brought_to_50(tmp_path: Path, rate: float) -> None:
    signal = motion(int(20 * rate), rate)
    path = table(tmp_path / "a.csv", signal, [f"{i / rate:.6f}" for i in range(len(signal))], clock="time_s")
    found = extract_sensor(path, find_columns(path))
    assert found.rate == pytest.approx(rate, rel=1e-4) and abs(len(found.values) - 62) <= 1
    expected = statistics(motion(1000))[: len(found.values)]
    levels = [k for k in range(96) if k % 48 < 28]  # means to maxima of the channels
    np.testing.assert_allclose(found.values[1:-2, levels], expected[1:-2, levels], atol=0.15)
    assert any("of 10 rows a second nothing above 5 Hz" in note for note in found.notes) == (rate == 10)
    assert len(found.notes) == (rate == 10)


def test_faster_signals_are_averaged_and_not_picked(tmp_path: Path) -> None:
    """1 of every 4 rows of this would be a constant 1."""
    signal = np.tile(np.array([1.0, 0, -1, 0])[:, None], (500, 3))
    path = table(tmp_path / "a.csv", signal, names=NAMES[:3])
    found = extract_sensor(path, Columns((NAMES[:3],)), rate=200)
    assert np.abs(found.values[1:-1, 0]).max() < 0.3


def test_empty_cells_gaps_and_double_times_are_said(tmp_path: Path) -> None:
    signal, times = motion(), [0.02 * i for i in range(500)]
    times[250:] = [t + 3 for t in times[250:]]
    times[10] = times[9]
    path = table(tmp_path / "a.csv", signal, times)
    lines = path.read_text().splitlines()
    for row, value in ((5, ""), (6, "NaN")):
        cells = lines[row].split(",")
        cells[2] = value
        lines[row] = ",".join(cells)
    path.write_text("\n".join(lines))
    found = extract_sensor(path, Columns(SENSORS, "time", "s"))
    assert found.notes == (
        "column 'acc_y': 2 empty cells filled by straight lines",
        "1 row with the time of the row before",
        "1 gap of up to 3.0 s between rows, filled by straight lines",
    )
    assert len(found.values) == int(found.duration * 50) // 16


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("time,ax,ay,az,gx,gy,gz", (("ax", "ay", "az"), ("gx", "gy", "gz"))),
        ("time,Acc X (g),Acc Y (g),Acc Z (g)", (("Acc X (g)", "Acc Y (g)", "Acc Z (g)"),)),
        ("index,time,acc.x,acc.y,label,temperature,subject_id", (("acc.x", "acc.y"), ("temperature",))),
        ("time,hr,emg", (("hr",), ("emg",))),
        ("time,x,y,z", (("x", "y", "z"),)),
    ],
)
def test_sensors_are_found_by_their_names(tmp_path: Path, header: str, expected: tuple) -> None:
    width = header.count(",") + 1
    rows = [",".join([*(f"{0.02 * i + k:.2f}" for k in range(width))]) for i in range(200)]
    (tmp_path / "a.csv").write_text("\n".join([header, *rows]))
    assert find_columns(tmp_path / "a.csv").sensors == expected


@pytest.mark.parametrize("delimiter", [";", "\t", ","])
def test_delimiters_and_decimal_commas(tmp_path: Path, delimiter: str) -> None:
    signal = motion(100)
    path = table(tmp_path / "a.csv", signal, [0.02 * i for i in range(100)])
    text = path.read_text().replace(",", delimiter)
    path.write_text("\ufeff" + (text.replace(".", ",") if delimiter == ";" else text))
    columns = find_columns(path)
    assert columns == Columns(SENSORS, "time", "s")
    np.testing.assert_allclose(extract_sensor(path, columns).values, statistics(signal), rtol=1e-3, atol=1e-3)


def changed(row: int, cell: int, value: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        lines = text.splitlines()
        cells = lines[row - 1].split(",")
        cells[cell] = value
        lines[row - 1] = ",".join(cells)
        return "\n".join(lines)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(7, 2, "abc"), "row 7, column 'acc_y': 'abc' is no number; mend it"),
        (changed(7, 2, "inf"), "row 7, column 'acc_y': 'inf' is no number"),
        (changed(7, 2, "1e30"), "row 7, column 'acc_y': 1e.30 is no sensor's; mend it"),
        (changed(7, 2, "1_0"), "row 7, column 'acc_y': '1_0' is no number"),
        (changed(7, 0, ""), "row 7 has no time in column 'time'"),
        (changed(7, 0, "0.01"), "row 7: the time in column 'time' goes back; sort or mend the rows"),
        (changed(7, 0, "x"), "row 7, column 'time': 'x' is no number"),
        (changed(1, 2, "acc_v"), "has no column 'acc_y' .did you mean 'acc_z'..; it has 'time', 'acc_x', 'acc_v'"),
        (changed(1, 2, "acc_x"), "two columns are called 'acc_x'; rename one"),
        (changed(7, 2, "1,2"), "row 7 has 8 cells, row 1 7; mend or remove it"),
        (lambda text: "\n".join(text.splitlines()[1:]), "row 1 holds numbers; write the names of the columns above it"),
        (lambda text: "\n".join(text.splitlines()[:2]), "has 1 row below its first line"),
        (lambda text: "", "has 0 rows below its first line"),
        (lambda text: "\n".join(text.splitlines()[:12]), "lasts 0.22 s, and a snippet needs 0.36; leave it out"),
        (lambda text: text + '"', "not valid CSV"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, change: Callable[[str], str], message: str) -> None:
    path = table(tmp_path / "a.csv", motion(), [f"{0.02 * i:.2f}" for i in range(500)])
    path.write_text(change(path.read_text()))
    with pytest.raises(InputError, match=message) as error:
        extract_sensor(path, Columns(SENSORS, "time", "s"))
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_column_that_is_mostly_empty(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", np.full((100, 6), np.nan), [0.02 * i for i in range(100)])
    with pytest.raises(InputError, match="column 'acc_x' is empty in 100 of 100 rows; leave it out"):
        extract_sensor(path, Columns(SENSORS, "time", "s"))
    with pytest.raises(InputError, match="has no column of numbers beside the time; name some with --columns"):
        find_columns(path)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (("acc_x",), {}, "has no column of times by its name .'acc_x'.; name it with --time-column, or .* --rate"),
        (("time", "timestamp", "a"), {}, "columns 'time', 'timestamp' may all be the time; name it with --time-column"),
        (("time", "a"), {"time": "tim"}, "has no column 'tim' .did you mean 'time'.."),
        (("time", "a"), {"sensors": [["b"]]}, "has no column 'b'"),
        (("time", "a"), {"sensors": [["a"], ["a"]]}, "--columns a,a: names a column twice"),
        (("time", "a"), {"unit": "h"}, "--time-unit h: give s, ms, us, ns or date"),
    ],
)
def test_columns_that_are_not_there(tmp_path: Path, names: tuple, options: dict, message: str) -> None:
    signal = np.stack([np.arange(100) * 0.02] * len(names), axis=1)
    with pytest.raises(InputError, match=message):
        find_columns(table(tmp_path / "a.csv", signal, names=names), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"window": 8}, "--window 8 is less than --stride 16"), ({"rate": 0}, "--rate is 0"), ({"fps": -1}, "--fps")],
)
def test_numbers_out_of_range(tmp_path: Path, options: dict, message: str) -> None:
    path = table(tmp_path / "a.csv", motion(100), [0.02 * i for i in range(100)])
    with pytest.raises(InputError, match=message):
        extract_sensor(path, Columns(SENSORS, "time", "s"), **options)


@pytest.mark.parametrize(
    ("names", "streams", "stream_names"),
    [
        (NAMES, [48, 48], ["acc_x+acc_y+acc_z", "gyr_x+gyr_y+gyr_z"]),
        (NAMES[:3], [48], ["sensors"]),
        (("a", "b", "c"), [36], ["sensors"]),
    ],
)
def test_what_is_said_of_them(tmp_path: Path, names: tuple, streams: list, stream_names: list) -> None:
    path = table(tmp_path / "a.csv", motion()[:, : len(names)], [20 * i for i in range(500)], names=names)
    method = sensor_method([tmp_path / "none.csv", path])  # a file that cannot be read is another's trouble
    about = method.about
    assert (about["streams"], about["stream_names"]) == (streams, stream_names)
    assert (about["fps"], about["window"], about["stride"], about["offset"]) == (50, 50, 16, -17)
    assert (about["time_column"], about["time_unit"], about["rate"]) == ("time", "ms", None)
    assert method.extract(path, None).values.shape == (31, sum(streams))


def test_no_file_that_can_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"one\.csv"):
        sensor_method([tmp_path / "one.csv", tmp_path / "two.csv"])
