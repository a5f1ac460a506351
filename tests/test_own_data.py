"""docs/own-data.md, word by word: every command on it, on small recordings, does what it says."""

from __future__ import annotations

import glob
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from d2net.cli import app
from d2net.data import find_dataset, read_annotations
from d2net.detections import read_detections
from d2net.evaluation import evaluate
from d2net.recipes import load_recipe

PAGE = (Path(__file__).parents[1] / "docs" / "own-data.md").read_text(encoding="utf-8")
COMMANDS = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
RECORDINGS, SNIPPETS, WIDTH = 30, 60, 12

pytestmark = pytest.mark.usefixtures("one_thread")


def blocks(section: str, language: str) -> list[str]:
    """The code of one section of the page, in order."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def make(folder: Path, names: list[str], *, with_tables: bool = True) -> None:
    """Recordings in which two things happen, as the tables on the page begin."""
    rng = np.random.default_rng(0)
    labels, segments = (text.splitlines() for text in blocks("You have features", "csv"))
    known = {line.split(",")[0]: line.split(",") for line in labels[1:]}
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        x = rng.normal(0, 1, (SNIPPETS, WIDTH)).astype(np.float32)
        own = known[name][1].split(";") if name in known else [["jump", "throw"][i % 2]]
        rows = [line.split(",") for line in segments[1:] if line.startswith(name)]
        if rows:
            own = [label for _, label, *_ in rows]
        for k, label in enumerate(own if not rows else []):
            start = 5 + 10 * k + int(rng.integers(4))
            rows.append([name, label, str(start), str(start + 4)])
        for _, label, start, end in rows:
            x[int(2 * float(start)) : int(2 * float(end)), ["jump", "throw"].index(label) :: 2] += 2
        np.save(folder / f"{name}.npy", 1000 * x + 5000)  # in a unit that nobody has thought of
        if name not in known:
            labels.append(f"{name},{';'.join(own)},{'train' if i < 20 else 'test'}")
        if i >= 20 and name != "rec-21":
            segments += [",".join(row) for row in rows]
    if with_tables:
        (folder / "labels.csv").write_text("\n".join(labels))
        (folder / "segments.csv").write_text("\n".join(segments))
    (time,) = blocks("You have features", "json")
    (folder / "features.json").write_text(time)


def run(line: str) -> None:
    """A command as a shell runs it: patterns of files, and > FILE."""
    line, _, target = line.partition(" > ")
    words = [w for word in shlex.split(line)[1:] for w in (sorted(glob.glob(word)) if "*" in word else [word])]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "120", "D2NET_DEBUG": None})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, f"{line}\n{result.output}"
    if target:
        Path(target).write_text(result.stdout, encoding="utf-8")


def follow(section: str) -> list[str]:
    """Run the commands of a section; those that this d2net has not are returned."""
    absent = []
    for line in "".join(blocks(section, "sh")).splitlines():
        assert line.startswith("d2net ")
        if line.split()[1] in COMMANDS:
            run(line)
        else:
            absent.append(line)
    return absent


def names(prefix: str) -> list[str]:
    return [f"{prefix}-{i + 1:02d}" for i in range(RECORDINGS)]


def check(detections: Path, data: str) -> None:
    """What was found is right, in recordings that were not trained on."""
    found = read_detections(detections)
    assert len(found.videos) == RECORDINGS - 20
    result = evaluate(found, read_annotations(data, subset="test"), tiou=0.5)
    assert result.map[0] > 80


def test_features(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(Path("my-data"), names("rec"))
    make(Path("new"), names("new")[:3], with_tables=False)
    for line in follow("You have features"):
        assert line.split()[1] in ("report", "predict")
    check(Path("runs/mine/detections.json"), "my-data")
    check(Path("runs/mine/detections.csv"), "my-data")
    strong = read_detections("strong.csv")
    assert 0 < len(strong) < len(read_detections("runs/mine/detections.csv")) and strong.score.min() >= 0.3
    assert Path("timeline.png").stat().st_size > 10_000
    assert follow("Other settings") == []
    assert load_recipe("mine.yaml").training == load_recipe("generic").training


def sensor_file(path: Path, rng: np.random.Generator, bursts: list[tuple[float, float, str]]) -> None:
    """40 s at 50 Hz: noise, with a slow swing or a fast one where something happens."""
    time = np.arange(40 * 50) / 50
    x = rng.normal(0, 0.2, (len(time), 3)) + [0, 0, 9.8]
    for start, end, label in bursts:
        inside = (time >= start) & (time < end)
        x[inside] += 4 * np.sin(2 * np.pi * {"jump": 2, "throw": 7}[label] * time[inside, None] + [0, 1, 2])
    rows = [f"{t:.2f},{a:.4f},{b:.4f},{c:.4f}" for t, (a, b, c) in zip(time, x, strict=True)]
    path.write_text("\n".join(["time,ax,ay,az", *rows]))


@pytest.mark.skipif("features" not in COMMANDS, reason="this d2net has no command features")
def test_sensors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(1)
    labels, segments = ["recording,labels,subset"], ["recording,label,start,end"]
    for folder in ("sensors", "new-sensors", "features"):
        Path(folder).mkdir()
    for i, name in enumerate(names("wrist")):
        label, start = ("jump", "throw")[i % 2], 5 + float(rng.integers(20))
        sensor_file(Path("sensors", f"{name}.csv"), rng, [(start, start + 8, label)])
        labels.append(f"{name},{label},{'train' if i < 20 else 'test'}")
        segments += [f"{name},{label},{start},{start + 8}"] if i >= 20 else []
    sensor_file(Path("new-sensors", "new.csv"), rng, [(10, 18, "throw")])
    Path("features/labels.csv").write_text("\n".join(labels))
    Path("features/segments.csv").write_text("\n".join(segments))
    for line in follow("You have sensors' files"):
        assert line.split()[1] in ("report", "predict")
    check(Path("runs/sensors/detections.json"), "features")


def test_videos(tmp_path, monkeypatch):
    """From features on: those of videos are a matter of tests/features."""
    monkeypatch.chdir(tmp_path)
    make(Path("video-features"), names("rec"))
    first, *lines = "".join(blocks("You have videos", "sh")).splitlines()
    assert first == "d2net features videos/ --out video-features/"
    for line in lines:
        if line.split()[1] in COMMANDS - {"predict"}:
            run(line)
    check(Path("runs/videos/detections.json"), "video-features")


def test_every_language_on_the_page_is_tested():
    """No command stands where no test looks for it."""
    tested = ("You have features", "You have sensors' files", "You have videos", "Other settings")
    assert PAGE.count("```sh\n") == sum(len(blocks(section, "sh")) for section in tested)
    assert PAGE.count("```csv\n") == 2 and PAGE.count("```json\n") == 1


def test_how_the_recipe_was_chosen(tmp_path, monkeypatch):
    """The recipe and the program that are given there are whole, and the first row is what ships."""
    monkeypatch.chdir(tmp_path)
    section = "How the recipe was chosen"
    (recipe,) = blocks(section, "yaml")
    Path("first.yaml").write_text(recipe)
    first, shipped = load_recipe("first.yaml"), load_recipe("generic")
    assert first.model == shipped.model and first.loss == shipped.loss
    assert first.override(["training.max_snippets=750"]).training == shipped.training
    (program,) = blocks(section, "python")
    monkeypatch.setattr("sys.argv", ["simulated.py", "first.yaml", "few: training.iterations=2 model.embedding_dim=4"])
    exec(compile(program, "simulated.py", "exec"), {})
    assert find_dataset("simulated").subsets == ("train", "test")
    assert {p.name for p in Path().glob("simulated-*")} == {"simulated-0", "simulated-1"}
