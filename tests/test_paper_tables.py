"""The paper's tables: every number as printed there, and a run beside them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from d2net.cli import app
from d2net.detections import Detections, read_features, write_detections
from d2net.errors import InputError
from d2net.evaluation import Coverage, Evaluation
from d2net.report.page import comparison_page_table
from d2net.report.paper_tables import PaperTable, compare, comparison_table, load_table, table_names


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "120", "D2NET_DEBUG": None})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def fails(*arguments: object) -> str:
    lines = run(*arguments, code=2).stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def evaluation(levels: tuple[float, ...], recordings: int = 2383, unlisted: tuple[str, ...] = ()) -> Evaluation:
    values = 100 * (1 - np.array(levels))
    coverage = Coverage(
        protocol="activitynet",
        recordings=recordings,
        without_segments=(),
        judged=recordings,
        without_detections=unlisted,
        unlisted=unlisted,
        renamed="",
        detections=1,
        dropped={},
        false_positives={},
        classes=1,
        classes_without_segments=(),
        classes_without_detections=(),
        ambiguous_segments=0,
    )
    return Evaluation("activitynet", levels, values, float(values.mean()), 10.0, {"a": values.tolist()}, coverage)


def test_tables_say_what_they_are() -> None:
    named = ["thumos14", "activitynet12", "activitynet13", "thumos14-losses", "thumos14-denoising"]
    assert sorted(table_names()) == sorted(named)
    t14, anet, anet13 = map(load_table, named[:3])
    assert (len(t14.rows), t14.tiou, t14.levels) == (20, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7), t14.tiou)
    assert (len(anet.rows), anet.tiou, len(anet.levels)) == (10, (0.5, 0.75, 0.95), 10)
    assert (anet13.title, anet13.rows, anet13.tiou, anet13.levels) == (None, (), anet.tiou, anet.levels)
    for table in (t14, anet, anet13):
        assert all(len(row.map) == len(table.tiou) for row in (*table.rows, *table.later))
    assert [r.method for r in t14.rows if r.supervision == "strong"] == ["R-C3D", "GTAD", "TAL-Net", "P-GCN"]
    assert [r.method for r in anet.rows if r.supervision == "strong"] == ["SSN"]
    # "all weakly-supervised methods in Tab. 1 use an I3D backbone, except Autoloc, which uses TSN" (Sec. 4.1)
    assert {r.features for r in t14.rows if r.supervision == "weak" and r.method != "Autoloc"} == {"I3D"}
    assert t14.rows[4].method == "Autoloc" and t14.rows[4].features == "TSN"


def test_ablations_of_the_paper() -> None:
    """Sec. 4.2: 23.0, 26.7, 32.2, 36.0 (Table 3), 32.9 and 33.5 (Table 4); D2-Net's row is that of Table 1."""
    losses, denoising = load_table("thumos14-losses"), load_table("thumos14-denoising")
    assert (losses.title, denoising.title) == ("Table 3", "Table 4")
    assert {r.method: r.map[-1] for r in losses.rows} == {"L_CE": 23.0, "L_F": 26.7, "L_Dis": 32.2, "D2-Net": 36.0}
    assert {r.method: r.map for r in denoising.rows} == {"L1": (32.9,), "BCE": (33.5,), "D2-Net": (36.0,)}
    assert losses.rows[-1].map == load_table("thumos14").rows[-1].map[:5]
    assert [r.map[1] for r in losses.rows] == [47.6, 52.4, 59.7, 60.2]


def test_known_rows() -> None:
    def row(table: PaperTable, method: str):
        return next(r for r in table.rows if r.method == method)

    t14, anet = load_table("thumos14"), load_table("activitynet12")
    assert row(t14, "D2-Net").map == (65.7, 60.2, 52.3, 43.4, 36.0, None, None)
    assert row(t14, "DML").map == (62.3, None, 46.8, None, 29.6, None, None)
    assert row(t14, "UM").map[4] == 33.7  # "2.3% at IoU=0.5 over the best existing method (UM)"
    assert (row(anet, "D2-Net").map, row(anet, "D2-Net").average) == ((42.3, 25.5, 5.8), 26.0)
    assert (row(anet, "EM-MIL").map, row(anet, "EM-MIL").average) == ((37.4, None, None), 20.3)


@pytest.mark.parametrize("name", ["thumos14", "activitynet12"])
def test_every_number_is_the_papers(name: str, shared: Path) -> None:
    table = load_table(name)
    lines = (shared / "paper" / "d2net.txt").read_text(encoding="utf-8").splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(f"{table.title}. **State-of-the-art"))
    begin = next(i for i in range(begin, len(lines)) if re.search(r"\[\d+\].*\t", lines[i]))
    rows = [line.split("\t") for line in lines[begin : lines.index("", begin)]]
    assert len(rows) == len(table.rows)
    for (label, *cells), row in zip(rows, table.rows, strict=True):
        printed = [None if c == "-" else float(c) for c in cells if c]
        # Table 1 ends at IoU 0.5 and has no average.
        ours = [*row.map, row.average] if name == "activitynet12" else [*row.map[:5]]
        assert printed == ours and (name == "activitynet12" or (*row.map[5:], row.average) == (None,) * 3), label
        assert row.venue is row.source is None
        assert row.method in label and label.endswith(("+", "⁺")) == (row.supervision == "strong")
        assert row.reference is None or f"[{row.reference}]" in label


@pytest.mark.parametrize("name", table_names())
def test_every_table_takes_a_run(name: str) -> None:
    table = load_table(name)
    found = compare(
        table, evaluation(table.levels), run="mine", features="I3D", data=table.dataset, classes=table.classes
    )
    assert (found.run.average is None) == (not table.average_tiou)
    assert len(comparison_table(found).columns) == 3 + len(table.tiou) + bool(table.average_tiou)
    assert (
        len(comparison_page_table(found).header)
        == len(comparison_page_table(found).rows[0])
        == len(comparison_table(found).columns)
    )


LATER = {
    "thumos14": ["CO2-Net", "ASM-Loc", "DELU", "P-MIL", "DDG-Net"],
    "activitynet12": ["CO2-Net", "DELU", "P-MIL", "DDG-Net"],
    "activitynet13": ["ASM-Loc", "P-MIL"],
}


@pytest.mark.parametrize("name", LATER)
def test_later_rows_say_where_they_are_from(name: str) -> None:
    table = load_table(name)
    assert [row.method for row in table.later] == LATER[name]
    for row in table.later:
        assert row.source and row.source.startswith("github.com/") and row.source in table.footnote()
        assert row.venue and int(row.venue[-4:]) >= 2021 and row.name() == f"{row.method} ({row.venue}) †"
        assert row.reference is None and None not in row.map and list(row.map) == sorted(row.map, reverse=True)
        # What was published as their average is one, within what rounding does to a mean of seven.
        assert name != "thumos14" or row.average == pytest.approx(sum(row.map) / 7, abs=0.1)


@pytest.mark.parametrize("name", LATER)
def test_later_rows_are_told_apart_wherever_a_table_is_drawn(name: str) -> None:
    table = load_table(name)
    comparison = compare(table, evaluation(table.levels), run="r", features="I3D", data="d", classes=table.classes)
    console = Console(width=80)
    with console.capture() as captured:
        console.print(comparison_table(comparison))
    lines = captured.get().splitlines()
    end = next(i for i, line in enumerate(lines) if line.startswith("└"))
    assert all(line[-1] == "│" for line in lines if line.startswith("│")), "the last column is cut"
    # A line between the paper's rows and the later ones, and between those and the run's; which have daggers.
    rules = [i for i, line in enumerate(lines) if line.startswith("├")]
    assert len(rules) == (2 if table.rows else 1)
    assert "†" not in "".join(lines[: rules[0]]) or not table.rows
    assert "".join(lines[rules[-2] if table.rows else 0 : rules[-1]]).count("†") == len(LATER[name])
    assert "†" not in "".join(lines[rules[-1] : end]) and "† not in the paper" in " ".join(lines[end:])

    page = comparison_page_table(comparison)
    daggers = [row[0] for row in page.rows if row[0].endswith("†")]
    assert len(daggers) == len(LATER[name]) and page.notes[0] == table.footnote()
    assert page.rows[-1][0].startswith("r") and all(len(row) == len(page.header) for row in page.rows)
    assert ("of the paper" in page.title) == (name != "activitynet13")

    saved = comparison.to_json()
    assert [row["method"] for row in saved["later"]] == LATER[name] and len(saved["rows"]) == len(table.rows)


def test_unknown_table() -> None:
    with pytest.raises(InputError, match="did you mean 'thumos14'.*there are thumos14, activitynet12, activitynet13"):
        load_table("thumos")


def test_average_is_over_the_tables_levels() -> None:
    table = load_table("activitynet12")
    result = compare(table, evaluation((0.1, *table.levels)), run="r", features="I3D", data="anet", classes=100)
    assert result.run.map == pytest.approx((50, 25, 5)) and result.run.average == pytest.approx(27.5)
    assert not result.simulated and result.notes == ()


@pytest.mark.parametrize(
    ("features", "data"), [(None, "simulated gt"), ("I3D", "Simulated"), ("simulated x (8 + 8)", "gt.json")]
)
def test_simulated_is_said_in_the_row(features: str | None, data: str) -> None:
    table = load_table("thumos14")
    result = compare(table, evaluation(table.levels), run="r", features=features, data=data, classes=20)
    assert result.simulated and "simulated" in (result.run.features or "") and "simulated" in result.notes[0]
    assert result.to_json()["run"]["simulated"] is True
    shown = comparison_table(result)
    assert "simulated" in list(shown.columns[2].cells)[-1] and shown.row_count == 20 + 5 + 1


def test_other_data_and_unknown_features_are_noted() -> None:
    table = load_table("thumos14")
    result = compare(table, evaluation(table.levels), run="r", features=None, data="watch", classes=5)
    assert result.run.features == "not stated" and result.run.method == "r, on watch"
    assert len(result.notes) == 2 and "other data" in result.notes[0] and "--features" in result.notes[1]


@pytest.mark.parametrize(
    ("name", "classes", "recordings", "unlisted", "method", "notes"),
    [
        ("thumos14", 20, 210, 0, "r", []),
        ("thumos14", 20, 213, 0, "r", []),
        ("thumos14", 20, 213, 93, "r (120 of 213 recordings)", ["the detections list 120 of the 213 recordings"]),
        ("thumos14", 20, 410, 0, "r (410 recordings)", ["410 recordings that count, more than the test set"]),
        ("thumos14", 20, 201, 0, "r (201 of 210 recordings)", ["the annotations have 201 recordings that count"]),
        ("activitynet12", 100, 2383, 0, "r", []),
        (
            "activitynet12",
            100,
            2300,
            50,
            "r (2250 of 2383 recordings)",
            ["the detections list 2250 of the 2300 recordings", "the test set of ActivityNet1.2 has at least 2383"],
        ),
        ("thumos14", 5, 40, 0, "r, on d", ["other data"]),
        ("thumos14", 5, 40, 4, "r, on d (36 of 40 recordings)", ["other data", "list 36 of the 40 recordings"]),
    ],
)
def test_a_part_of_the_recordings_is_said(name, classes, recordings, unlisted, method, notes) -> None:
    table = load_table(name)
    result = evaluation(table.levels, recordings, tuple(f"v{i}" for i in range(unlisted)))
    compared = compare(table, result, run="r", features="I3D", data="d", classes=classes)
    assert compared.run.method == method
    assert len(compared.notes) == len(notes)
    for note, expected in zip(compared.notes, notes, strict=True):
        assert expected in note and "cannot be compared" in note


def one_detection(path: Path, features: str | None = None) -> Path:
    nought, one = np.zeros(1, np.int64), np.ones(1)
    write_detections(path, Detections(("a",), ("Jump",), nought, nought, one, 5 * one, score=one), features)
    return path


def test_detections_remember_their_features(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    assert read_features(one_detection(path)) is None
    assert read_features(one_detection(path, "I3D (1024 + 1024)")) == "I3D (1024 + 1024)"
    for foreign in (
        {},
        {"external_data": None},
        {"external_data": {"details": 3}},
        {"external_data": {"details": " "}},
    ):
        path.write_text(json.dumps(foreign))
        assert read_features(path) is None


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    video = {"subset": "test", "annotations": [{"label": "Jump", "segment": [1.0, 5.0]}]}
    path = tmp_path / "gt.json"
    path.write_text(json.dumps({"name": "mine", "database": {"a": video}}))
    return path


def test_evaluate_compare(tmp_path: Path, truth: Path) -> None:
    found, out = one_detection(tmp_path / "d.json"), tmp_path / "out.json"
    command = ["evaluate", found, "--annotations", truth, "--json", out]
    text = run(*command, "--compare", "thumos14", "--features", "C3D [v1]").stdout
    assert "CoLA [42]" in text and "C3D [v1]" in text and "36.0" in text
    saved = json.loads(out.read_text())
    assert saved["comparison"]["run"]["map"] == [100] * 7 and len(saved["comparison"]["rows"]) == 20
    assert saved["comparison"]["run"]["features"] == "C3D [v1]"

    # The run's own levels stay, and the table's are evaluated besides where they do not cover them.
    text = run(*command, "--compare", "activitynet12", "--tiou", "0.3").stdout
    assert "mAP@0.3" in text and "not stated" in text and "average" in text
    saved = json.loads(out.read_text())
    assert list(saved["map"]) == ["0.3"] and saved["comparison"]["run"]["map"] == [100, 100, 100]
    run(*command)
    assert "comparison" not in json.loads(out.read_text())


def test_evaluate_says_simulated(tmp_path: Path, truth: Path) -> None:
    command = ["evaluate", one_detection(tmp_path / "d.json", "simulated mine (8 + 8)"), "--compare", "thumos14"]
    text = run(*command, "--annotations", truth, "--features", "I3D").stdout
    assert "simulated mine (8 + 8); I3D" in text and "note: the run's data are simulated" in text
    content = json.loads(truth.read_text())
    truth.write_text(json.dumps({**content, "name": "simulated thing"}))  # as d2net convert writes
    silent = one_detection(tmp_path / "d.json")
    assert "simulated; not stated" in run("evaluate", silent, "--compare", "thumos14", "--annotations", truth).stdout


def test_evaluate_refuses(tmp_path: Path, truth: Path) -> None:
    command = ["evaluate", one_detection(tmp_path / "d.json"), "--annotations", truth]
    assert "unknown table 'thumos15'" in fails(*command, "--compare", "thumos15")
    assert "--compare" in fails(*command, "--features", "I3D")
