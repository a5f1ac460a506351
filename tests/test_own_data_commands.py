"""What the commands say of a folder of one's own: what is missing, what is taken for granted, what would be lost."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from d2net.checkpoint import load_checkpoint
from d2net.cli import app
from d2net.cli.options import choose_recipe
from d2net.detections import read_detections

SMALL = ("--set", "training.iterations=2", "--set", "model.embedding_dim=4", "--device", "cpu")
TIME = ("--seconds-per-snippet", "0.5")

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "120", "D2NET_DEBUG": None})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def fails(*arguments: object) -> str:
    *notes, line = run(*arguments, code=2).stderr.splitlines()
    assert line.startswith("error: ") and all(note.startswith("note: ") for note in notes)
    return line


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Four recordings, of which one is called as a formula is; no segments."""
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own"
    own.mkdir()
    for i, name in enumerate(("=a", "b", "c", "d")):
        np.save(own / f"{name}.npy", np.random.default_rng(i).random((20 + i, 3), np.float32))
    (own / "labels.csv").write_text("recording,labels\n=a,run\nb,jump\nc,run;jump\nd,\n")
    return own


def test_from_the_folder_to_a_csv(folder):
    text = run("train", "--data", folder, *TIME, "--out", "run", *SMALL)
    assert "note: the recipe is generic, for data of your own; --recipe NAME or FILE.yaml takes another" in text.stderr
    assert "labels.csv has no column subset, so all labelled recordings are 'train'" in text.stderr
    assert "without a label ('d') are 'unlabelled': not trained on" in text.stderr
    assert "train: 3 recordings" in text.stdout
    assert load_checkpoint("run").recipe.name == "generic"
    assert load_checkpoint("run").recipe.model.standardize
    said = run("localize", "run", "--data", folder, *TIME, "--subset", "all", "--out", "found.json").stdout
    assert "of 4 recordings (train, unlabelled) to found.json and found.csv" in said
    everything = read_detections("found.json")
    assert everything.videos == ("=a", "b", "c", "d") and "\n'=a," in Path("found.csv").read_text()
    np.testing.assert_array_equal(read_detections("found.csv").score, everything.score)
    middle = float(np.median(everything.score))
    said = run("localize", "run", "--data", folder, *TIME, "--out", "few.csv", "--min-score", middle).stdout
    few = read_detections("few.csv")
    assert 0 < len(few) < len(everything) and few.score.min() >= middle and "are left out" in said
    assert "to few.csv" in said and not Path("few.json").exists()
    assert (
        "note: labels.csv has no column subset"
        in run("localize", "run", "--data", folder, *TIME, "--out", "x.json").stderr
    )
    run("inspect", folder, *TIME)
    run("plot", "run", "--data", folder, *TIME, "--out", "p.png")
    run("convert", folder, "converted", *TIME)
    run("convert", "converted", "back", "--layout", "plain")
    assert "\n'=a," in Path("back/labels.csv").read_text() and not Path("back/segments.csv").exists()


def test_without_segments_there_is_nothing_to_evaluate_on(folder):
    Path("d.csv").write_text("recording,label,start,end,score\nb,jump,0,1,1\n")
    expected = (
        "own/segments.csv: no such file, and so there is nothing to evaluate on; write one: first recording,label"
    )
    assert expected in fails("evaluate", "d.csv", "--annotations", folder)
    train = ["train", "--data", folder, *TIME, "--out", "run", *SMALL]
    assert f"--eval-every, train: {folder}/segments.csv: no such file" in fails(*train, "--eval-every", 1)
    (folder / "segments.csv").write_text("recording,label,start,end\nb,jump,0,1\n")
    text = run("evaluate", "d.csv", "--annotations", folder, "--tiou", "0.5")
    assert "100.0" in text.stdout
    assert "2 recordings with a label of which segments.csv has no segment" in text.stderr
    (folder / "labels.csv").write_text("recording,labels,subset\nb,jump,train\nc,jump,test\n")
    assert "own/segments.csv: has no segment of these" in fails("evaluate", "d.csv", "--annotations", folder)


def test_a_clock_in_milliseconds_ends_a_training(folder):
    (folder / "segments.csv").write_text("recording,label,start,end\nb,jump,1000,9000\n")
    line = fails("train", "--data", folder, *TIME, "--out", "run", *SMALL)
    assert "segments.csv: line 2: segment ends at 9000 s, and recording 'b' at 10.5 s (21 snippets of 0.5 s)" in line
    assert "probably in milliseconds: divide them by 1000" in line


def test_nothing_to_learn(folder):
    (folder / "labels.csv").write_text("recording,labels\nb,\nc,\n")
    train = ["train", "--data", folder, *TIME, "--out", "run", *SMALL]
    assert "own/labels.csv: no recording has a label, and so there is nothing to learn" in fails(*train)
    (folder / "labels.csv").write_text("recording,labels,subset\nb,,train\nc,,train\n")
    assert "recording 'b' has no label (2 of the 2 have none" in fails(*train)
    assert "no recording has a label" in fails(*train, "--set", "loss.skip_unlabelled=true")
    (folder / "labels.csv").write_text("recording,labels\nb,run\nc,run;jump\n")
    assert "note: every recording to train on has the label 'run', so nothing shows" in run(*train).stderr


def test_a_known_dataset_has_its_own_recipe(folder):
    (folder / "labels.csv").write_text("recording,labels\n=a,BaseballPitch\nb,CliffDiving\nc,ThrowDiscus\n")
    text = run("train", "--data", folder, *TIME, "--out", "run", *SMALL)
    assert "note: the recipe is thumos14-paper, by the classes of this data" in text.stderr


@pytest.mark.parametrize(("others", "recipe"), [(97, "activitynet12-paper"), (197, "activitynet13")])
def test_activitynet_is_told_by_the_number_of_its_classes(others, recipe, capsys):
    """1.3 has the classes of 1.2 and a hundred more."""
    classes = ("Archery", "Bathing dog", "Cumbia", *(f"class {i}" for i in range(others)))
    assert choose_recipe(None, "anet", SimpleNamespace(classes=classes)) == recipe
    assert f"note: the recipe is {recipe}, by the classes of this data" in capsys.readouterr().err


def test_a_recipe_of_ones_own(folder):
    Path("mine.yaml").write_text(run("recipes", "generic").stdout)
    train = ["train", "--data", folder, *TIME, "--out", "run", "--recipe", "mine.yaml", *SMALL]
    assert "the recipe is" not in run(*train).stderr and load_checkpoint("run").recipe.name == "mine"
    assert "the recipes have the same values" in run("recipes", "generic", "mine.yaml").stdout
    text = Path("mine.yaml").read_text().replace("iterations: 400", "iterations: 4OO")
    Path("mine.yaml").write_text(text)
    number = next(i for i, line in enumerate(text.splitlines(), 1) if "4OO" in line)
    expected = f"error: mine.yaml: line {number}: training.iterations is '4OO'; it must be a whole number"
    assert fails(*train, "--overwrite") == expected
    assert fails("study", "ablation", "--data", folder, *TIME, "--recipe", "mine.yaml", "--out", "s") == expected
    assert fails("study", "condition-number", "--recipe", "mine.yaml", "--out", "s") == expected
    assert fails("recipes", "mine.yaml") == expected


def test_what_is_read_is_not_written_over(folder):
    run("train", "--data", folder, *TIME, "--out", "run", *SMALL)
    before = (folder / "labels.csv").read_bytes()
    line = fails("localize", "run", "--data", folder, *TIME, "--out", folder / "labels.json")
    assert "labels.csv: is a file that is read here" in line
    assert (folder / "labels.csv").read_bytes() == before and not (folder / "labels.json").exists()
    assert "--min-score nan: give a number" in fails(
        "localize", "run", "--data", folder, "--out", "d", "--min-score", "nan"
    )


def test_a_name_that_is_no_text_is_in_the_json_alone(folder):
    """As a file's may be: of a network that has such a class."""
    from d2net.cli.outputs import detection_files, write_all
    from d2net.detections import Detections

    one = np.ones(1)
    found = Detections(("\udcff",), ("x",), 0 * one.astype(int), 0 * one.astype(int), one, 2 * one, score=one)
    assert write_all(detection_files(Path("d.json")), found) == [Path("d.json")]
    assert sorted(name for name in os.listdir() if name.startswith("d.")) == ["d.json"]
