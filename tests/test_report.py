"""``report.html``: what is in it, what is escaped, what is said of what is not there; ``d2net report``."""

from __future__ import annotations

import base64
import html
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from d2net.cli import app
from d2net.data import open_dataset
from d2net.detections import Detections, write_detections
from d2net.errors import InputError
from d2net.evaluation import VERDICTS, analyse_errors, analyse_lengths, average_recall, averages
from d2net.recipes import load_recipe
from d2net.report import TimelineRow, Track
from d2net.report.facts import RunRecord, read_record, recipe_fact
from d2net.report.videos import find_videos
from d2net.training import Trainer

pytest.importorskip("bokeh", reason="Bokeh is not installed: pip install 'd2net[report]'")

from d2net.report.dataset_report import write_dataset_report  # noqa: E402
from d2net.report.page import NotInstalledError, check_installed, write_report  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ("Fall", "Jump", "Spin")
ODD = "<script>alert('x')</script> & \"q\" \x1b[31m \u202e \udc80"


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "120", "D2NET_DEBUG": None})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def fails(*arguments: object) -> str:
    lines = run(*arguments, code=2).stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def data_of(page: Path) -> dict[str, Any]:
    text = page.read_text("utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


def text_of(page: Path) -> str:
    """What a reader sees without JavaScript."""
    body = page.read_text("utf-8").split("<body>")[1].split("<script>")[0]
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body)))


def values(curve: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(curve), np.uint8) / 255


def row(name: str = "r", found: Any = (), tcam: np.ndarray | None = None, **more: Any) -> TimelineRow:
    attention = None if tcam is None else np.linspace(0, 1, len(tcam))
    truth = more.pop("truth", ())
    return TimelineRow(name, 0.5, CLASSES, truth, [Track("", found, tcam, attention)], 20.0, **more)


def dataset_folder(folder: Path, *, annotated: bool = True) -> Path:
    """Eight recordings of 40 snippets of half a second, in ActionFormer's layout."""
    rng = np.random.default_rng(0)
    (folder / "features").mkdir(parents=True)
    database = {}
    for i in range(8):
        segments = [{"label": CLASSES[i % 3], "segment": [4.0, 10.0]}] if annotated else []
        database[f"clip_{i}"] = {"subset": "train" if i < 4 else "test", "annotations": segments}
        np.save(folder / "features" / f"clip_{i}.npy", rng.standard_normal((40, 8)).astype(np.float32))
    facts = {"fps": 2, "stride": 1, "streams": [4, 4], "database": database}
    (folder / "gt.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dataset_folder(tmp_path_factory.mktemp("data") / "clips")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The folder of a run that evaluated while it was trained."""
    out = tmp_path_factory.mktemp("run") / "mine"
    settings = ["training.iterations=20", "training.batch_size=4", "model.embedding_dim=8"]
    flags = [flag for setting in settings for flag in ("--set", setting)]
    result = run("train", "--data", data, "--recipe", "watch", *flags, "--eval-every", 10, "--out", out)
    assert f"wrote {out / 'report.html'}" in result.stdout
    return out


def test_nothing_is_loaded_from_anywhere(tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    write_report(page, [row()], title="t")
    text = page.read_text("utf-8")
    assert re.findall(r'\b(?:src|href|srcset|action)\s*=\s*"([^"]*)"', text.split("<script>")[0]) == ["data:,"]
    assert "default-src 'none'" in text and '<link rel="stylesheet"' not in text and "@import" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_it_is_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    found = [(i / 10, i / 10 + 1, CLASSES[i % 3], float(rng.random())) for i in range(150)]
    rows = [row(f"video_test_{i:07d}", found, rng.random((1000, 3)), truth=[(1, 2, "Fall")] * 20) for i in range(40)]
    write_report(tmp_path / "r.html", rows, title="t")
    assert (tmp_path / "r.html").stat().st_size < 3_000_000


def test_whatever_a_name_holds_is_text(tmp_path: Path) -> None:
    classes = (ODD, "</script>")
    track = Track("", [(1, 2, ODD, 0.5)], np.ones((40, 2)))
    rows = [TimelineRow(ODD, 0.5, classes, [(1, 2, "</script>")], [track], 20.0)]
    page = tmp_path / "r.html"
    write_report(page, rows, title=ODD, facts=[(ODD, f"{ODD}\n{ODD}")], why_not_evaluated=ODD, logs={ODD: [
        {"iteration": 1, "total": 1.0}, {"iteration": 2, "total": 0.5}]})  # fmt: skip
    text = page.read_text("utf-8")
    assert "<script>alert" not in text and "\x1b" not in text and "\u202e" not in text
    assert text.count("</script>") == text.count("<script")  # none is closed early
    assert data_of(page)["recordings"][0]["name"] == ODD.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e").replace(
        "\udc80", r"\udc80"
    )
    assert r"""<script>alert('x')</script> & "q" \x1b[31m""" in text_of(page)


def test_what_is_drawn_is_what_there_is(tmp_path: Path) -> None:
    tcam = np.random.default_rng(0).random((40, 3))
    found = [(1.0, 2.5, "Jump", 0.5), (3.0, 4.0, "Fall", 0.9)]
    one = row("one", found, tcam, truth=[(1.0, 2.0, "Jump")], first_snippet=0.25)
    one = replace(one, tracks=[replace(one.tracks[0], verdicts=["true_positive", "background"])])
    write_report(tmp_path / "r.html", [row("empty"), one], title="t")
    data = data_of(tmp_path / "r.html")
    assert (data["first"], data["best"]) == (1, 0.9)
    empty, shown = data["recordings"]
    assert shown["classes"] == ["Fall", "Jump"] and shown["truth"] == [[1, 2, 1]]
    assert shown["found"] == [[3, 4, 0, 0.9, VERDICTS.index("background")], [1, 2.5, 1, 0.5, 0]]
    assert (shown["from"], shown["to"], shown["end"]) == (0.25, 20.25, 20.25)
    for curve, expected in zip(
        [*shown["curves"], *shown["attention"]],
        [tcam[:, 0], tcam[:, 1], tcam.max(axis=1), np.linspace(0, 1, 40)],
        strict=True,
    ):
        np.testing.assert_allclose(values(curve), expected, atol=0.5001 / 255)
    assert empty["found"] == [] and empty["curves"] == [] and shown["notes"] == []
    assert empty["notes"] == [
        "no annotation", "no detection", "activations are not known, as there are detections only"
    ]  # fmt: skip


def test_of_a_long_curve_the_peaks_stay(tmp_path: Path) -> None:
    tcam = np.zeros((100_000, 3))
    tcam[54_321, 0] = 1.0
    tcam[:, 1], tcam[99_999, 1] = 1.0, 0.0
    found = [(1.0, 2.0, c, 0.5) for c in CLASSES]
    write_report(tmp_path / "r.html", [row("r", found, tcam)], title="t")
    shown = data_of(tmp_path / "r.html")["recordings"][0]
    peak, dip, _ = map(values, shown["curves"])
    assert len(peak) <= 1200 and peak.max() == 1 and (peak > 0).sum() == 1 and dip.min() == 0
    middle = shown["from"] + (peak.argmax() + 0.5) / len(peak) * (shown["to"] - shown["from"])
    assert abs(middle - 54_321 * 0.5) < 100_000 * 0.5 / 600  # within its bucket
    assert "the curves show the highest and the lowest of every 167 of 100000 snippets" in shown["notes"]


def test_what_is_not_drawn_is_said(tmp_path: Path) -> None:
    classes = tuple(f"c{i}" for i in range(8))
    found = [(i, i + 1.0, classes[i % 8], 1 - i / 1000) for i in range(800)]
    one = TimelineRow("r", 1.0, classes, [(1, 2, "c7")], [Track("", found, None)], 900.0)
    write_report(tmp_path / "r.html", [one], title="t")
    shown = data_of(tmp_path / "r.html")["recordings"][0]
    assert shown["classes"] == ["c0", "c1", "c2", "c3", "c7"] and len(shown["found"]) == 200
    assert "3 more classes with 300 detections not drawn" in shown["notes"]
    assert "the 200 highest of 500 detections are drawn" in shown["notes"]


def test_a_recording_in_which_nothing_is_found_shows_its_highest_class(tmp_path: Path) -> None:
    tcam = np.full((40, 3), 0.1)
    tcam[3, 2] = 0.2
    write_report(tmp_path / "r.html", [row("r", (), tcam)], title="t")
    assert data_of(tmp_path / "r.html")["recordings"][0]["classes"] == ["Spin"]


@pytest.mark.parametrize("rows", [[], [row()]], ids=["no recording", "one"])
def test_as_little_as_there_can_be(tmp_path: Path, rows: list[TimelineRow]) -> None:
    write_report(tmp_path / "r.html", rows, title="t", logs={"": []})
    assert ("What was found where" in text_of(tmp_path / "r.html")) == bool(rows)
    assert "Training" not in text_of(tmp_path / "r.html")


def test_a_page_is_html_and_has_one_track_a_recording(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="r.pdf: a report is an HTML page; name it .html"):
        write_report(tmp_path / "r.pdf", [], title="t")
    two = replace(row(), tracks=[Track("a", []), Track("b", [])])
    with pytest.raises(InputError, match="it has 2 tracks; a report shows one"):
        write_report(tmp_path / "r.html", [two], title="t")
    assert not list(tmp_path.iterdir())


def test_films_are_found_from_the_page(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    film = tmp_path / "b c" / "50%#?.mp4"
    write_report(tmp_path / "a" / "r.html", [row("x"), row("y")], title="t", videos={"x": film})
    recordings = data_of(tmp_path / "a" / "r.html")["recordings"]
    assert [r["video"] for r in recordings] == ["../b%20c/50%25%23%3F.mp4", None]


def dataset_and_detections(folder: Path) -> tuple[Any, Detections]:
    dataset = open_dataset(folder, subsets=["test"])
    rows = [(0, 1, 4.0, 10.0, 0.9), (1, 2, 4.0, 6.0, 0.8), (2, 0, 4.5, 10.0, 0.7), (3, 0, 15.0, 16.0, 0.6)]
    x = np.array(rows, np.float64)
    names = tuple(r.name for r in dataset.recordings)
    return dataset, Detections(
        names, CLASSES, x[:, 0].astype(int), x[:, 1].astype(int), x[:, 2], x[:, 3], score=x[:, 4]
    )


def test_of_a_dataset_with_annotations(tmp_path: Path, data: Path) -> None:
    dataset, found = dataset_and_detections(data)
    result = write_dataset_report(tmp_path / "r.html", dataset, found, title="t", table="thumos14")
    text = text_of(tmp_path / "r.html")
    assert not isinstance(result, str)
    for name, numbers in {"mAP": result.map.tolist(), **result.per_class}.items():
        numbers = [*numbers, *averages(result.tiou, numbers).values()]
        assert f"{name} {' '.join(f'{v:.1f}' for v in numbers)}" in text
    assert "@0.7 average 0.1-0.5 average 0.3-0.7 average 0.1-0.7 mAP" in text
    assert average_recall(found, dataset.annotations()).line() in text
    lengths = analyse_lengths(found, dataset.annotations())
    assert lengths.ground_truth.tolist() == [0, 4, 0, 0, 0, 4]
    for i, name in ((1, "S 3-6 s 4"), (5, "all 4")):
        numbers = [v for of in (lengths.map_n[i], lengths.recall[i]) for v in (*of, of.mean())]
        assert f"{name} {' '.join(f'{v:.1f}' for v in numbers)}" in text
    assert f"XS 0-3 s 0{' –' * 16} S" in text
    assert "judged: 4 detections against 4 recordings" in text
    assert "Table 1 of the paper" in text and "D2-Net weak I3D 65.7 60.2 52.3 43.4 36.0 – – –" in text
    assert "the run was evaluated on other data" in text
    errors = analyse_errors(found, dataset.annotations())
    shown = [r["found"][0][4] for r in data_of(tmp_path / "r.html")["recordings"]]
    assert shown == errors.verdict.tolist() and f"the {errors.missed} of 4 annotations that no detection" in text


def test_of_a_dataset_without(tmp_path: Path) -> None:
    dataset, found = dataset_and_detections(dataset_folder(tmp_path / "data", annotated=False))
    said = write_dataset_report(tmp_path / "r.html", dataset, found, title="t", recordings=["clip_6"])
    assert said == "There is no mAP, as no recording has an annotation to compare detections with."
    assert said in text_of(tmp_path / "r.html") and "mAP@" not in text_of(tmp_path / "r.html")
    data = data_of(tmp_path / "r.html")
    assert [r["name"] for r in data["recordings"]] == ["clip_6"] and data["recordings"][0]["found"][0][4] is None
    with pytest.raises(InputError, match="recording 'clip_9' is none of the 4"):
        write_dataset_report(tmp_path / "r.html", dataset, found, title="t", recordings=["clip_9"])


def test_classes_that_the_annotations_do_not_have(tmp_path: Path, data: Path) -> None:
    dataset, found = dataset_and_detections(data)
    found = replace(found, classes=("Sit", "Jump", "Spin"))
    said = write_dataset_report(tmp_path / "r.html", dataset, found, title="t")
    assert isinstance(said, str) and "cannot be compared with the annotations" in said and "'Sit'" in said
    assert said in text_of(tmp_path / "r.html")


def test_the_recipe_and_where_it_differs() -> None:
    recipe = load_recipe("watch")
    assert recipe_fact(recipe) == ("recipe", "watch, unchanged")
    changed = recipe.override(["training.iterations=7", "localization.thresholds=[0.1,0.2]"])
    lines = recipe_fact(changed)[1].split("\n")
    assert lines[:2] == ["watch, but 2 settings:", "training.iterations = 7 (in the recipe 1200)"]
    assert lines[2].startswith("localization.thresholds = [0.1, 0.2] (in the recipe [0.025, ")
    assert recipe_fact(replace(recipe, name="mine"))[1] == "mine, which is none of d2net's"


def test_train_writes_one_where_it_evaluates(trained: Path, data: Path) -> None:
    text = text_of(trained / "report.html")
    assert "training.iterations = 20 (in the recipe 1200)" in text and "watch, but 3 settings:" in text
    assert "Loss and its terms" in text and "mAP while it was trained" in text
    assert re.search(r"\d\d:\d\d:\d\d UTC, took 0:\d\d:\d\d", text)
    assert f"d2net train --data {data}" in text and re.search(r"20 iterations on \S+, seed 0", text)
    assert re.search(r"d2net \d+\.\d+\.\d+", text) and "4 recordings (test)" in text
    shown = data_of(trained / "report.html")["recordings"]
    assert len(shown) == 4 and all(len(values(r["attention"][1])) == 40 for r in shown)


def test_report_of_a_run_needs_no_more_than_its_folder(trained: Path, tmp_path: Path) -> None:
    before = data_of(trained / "report.html")
    result = run("report", trained, "--out", tmp_path / "again.html")
    assert result.stdout.startswith(f"wrote {tmp_path / 'again.html'}: 4 recordings, ")
    assert data_of(tmp_path / "again.html") == before
    run("report", trained, "--out", tmp_path / "two.html", "--recordings", "clip_7,clip_5")
    assert [r["name"] for r in data_of(tmp_path / "two.html")["recordings"]] == ["clip_7", "clip_5"]


def test_report_of_detections(trained: Path, data: Path, tmp_path: Path) -> None:
    _, found = dataset_and_detections(data)
    write_detections(tmp_path / "theirs.json", found)
    films = tmp_path / "films"
    films.mkdir()
    (films / "v_clip_5.webm").touch()
    arguments = ("--detections", tmp_path / "theirs.json", "--data", data)
    assert "4 detections" in run("report", *arguments, "--videos", films).stdout
    shown = data_of(tmp_path / "report.html")["recordings"]
    assert [len(r["found"]) for r in shown] == [1] * 4 and all(r["attention"] == [] for r in shown)
    assert [r["video"] for r in shown] == [None, "films/v_clip_5.webm", None, None]
    assert "What was run" in text_of(tmp_path / "report.html") and "Training" not in text_of(tmp_path / "report.html")
    # With a run, these detections and its activations.
    run("report", trained, *arguments, "--out", tmp_path / "both.html")
    shown = data_of(tmp_path / "both.html")["recordings"]
    assert [len(r["found"]) for r in shown] == [1] * 4 and all(len(r["attention"]) == 2 for r in shown)


def test_mistakes_are_one_line(trained: Path, data: Path, tmp_path: Path) -> None:
    _, found = dataset_and_detections(data)
    write_detections(tmp_path / "d.json", found)
    assert "give the folder of a RUN, or --detections FILE.json" in fails("report")
    assert "--data: name the recordings" in fails("report", "--detections", tmp_path / "d.json")
    assert "name it .html" in fails("report", trained, "--out", tmp_path / "r.pdf")
    assert "recording 'clip_9' is none of" in fails("report", trained, "--recordings", "clip_9")
    assert "no such folder; --videos" in fails("report", trained, "--videos", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "such as clip_4.mp4; name the videos as" in fails("report", trained, "--videos", tmp_path / "empty")
    assert "--fps says something of the data; give --data too" in fails("report", trained, "--fps", 2)
    assert "unknown table 'thumos'" in fails("report", trained, "--compare", "thumos")
    out = tmp_path / "d.json"
    assert "is a file that is read here" in fails("report", "--detections", out, "--data", data, "--out", out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {"trust": True}}, "option 'trust' is True, which d2net does not write"),
        ({"options": {"fps": [1]}}, r"option 'fps' is \[1\]"),
        ({"data": 3}, "'data' is not text, but 3"),
        ({"test": [1]}, "a subset is not text"),
        ({"more": 1}, "it has 'more'"),
    ],
)
def test_a_record_that_is_none(trained: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    for name in ("checkpoint.safetensors", "run.json"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    record = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(record | change))
    line = fails("report", tmp_path)
    assert "run.json" in line and re.search(message, line)


def test_a_run_without_a_record_asks_for_its_data(trained: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes((trained / "checkpoint.safetensors").read_bytes())
    assert "--data: name the recordings" in fails("report", tmp_path)
    run("report", tmp_path, "--data", data)
    assert "Training" not in text_of(tmp_path / "report.html")


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = RunRecord("d2net train", "/data", {"fps": 25.0}, ["test"])
    written = record.write(tmp_path)
    assert written.ended >= written.began and replace(written, ended="") == record
    assert read_record(tmp_path) == written and read_record(tmp_path / "nowhere") is None


def test_films_beside_the_features(data: Path, tmp_path: Path) -> None:
    folder = dataset_folder(tmp_path / "data")
    (tmp_path / "clip 4.mp4").touch()
    (folder / "features" / "features.json").write_text(
        json.dumps({"recordings": {"clip_4": {"source": "../../clip 4.mp4"}, "clip_5": {"source": "gone.mp4"},
                                   "clip_6": {"source": 3}, "clip_7": {"source": "\0" + 999 * "x" + ".mp4"}}})
    )  # fmt: skip
    found = find_videos(open_dataset(folder, subsets=["test"]))
    assert {name: path.resolve() for name, path in found.items()} == {"clip_4": tmp_path / "clip 4.mp4"}
    assert find_videos(open_dataset(data, subsets=["test"])) == {}


def test_without_bokeh(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bokeh", None)
    with pytest.raises(NotInstalledError, match=r"needs Bokeh and Jinja2, .* pip install 'd2net\[report\]'"):
        check_installed()
    assert "pip install 'd2net[report]'" in fails("report", trained)


def test_bokeh_is_imported_for_a_report_alone() -> None:
    code = "import sys, d2net, d2net.report, d2net.cli.report; print('bokeh' in sys.modules, 'jinja2' in sys.modules)"
    code = code.replace("'jinja2' in sys.modules", "'d2net.report.page' in sys.modules")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False"]


def test_training_from_python_has_a_report_too(data: Path, tmp_path: Path) -> None:
    recipe = load_recipe("watch").override(["training.iterations=2", "training.batch_size=4", "model.embedding_dim=8"])
    Trainer(open_dataset(data, subsets=["train"]), recipe, out=tmp_path, tensorboard=False).run()
    run("report", tmp_path, "--data", data)
    assert "2 iterations on" in text_of(tmp_path / "report.html")


def test_the_document_names_options_that_there_are() -> None:
    text = (Path(__file__).parents[1] / "docs" / "report.md").read_text(encoding="utf-8")
    helped = " ".join(run(command, "--help").output for command in ("report", "train"))
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert flags and all(re.search(rf"{flag}\b", helped) for flag in flags), flags
