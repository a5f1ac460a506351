"""benchmarks/thumos14.sh from end to end on simulated features in the layout that it is for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import d2net
from d2net.data import convert

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "thumos14.sh"
SMALL = [
    *("training.iterations=20", "training.batch_size=8", "training.max_snippets=40"),
    "training.denoising_start=10",  # the released code begins L_D after iteration 1000: D2-Net would be L_Dis
]


def call(folder: Path, *options: str) -> subprocess.CompletedProcess:
    words = [SCRIPT, folder / "data", "--out", folder / "out", "--runs", folder / "runs", "--device", "cpu", *options]
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        # The d2net of these tests, which may be installed: the repository itself need not have a built module.
        "PYTHONPATH": os.pathsep.join([str(Path(d2net.__file__).parents[1]), *sys.path]),
    }
    return subprocess.run(["bash", *map(str, words)], capture_output=True, text=True, env=environment, timeout=500)


def settings(*more: str) -> list[str]:
    return [word for s in (*SMALL, *more) for word in ("--set", s)]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A folder with data of which one test video is missing, and what the script said of it."""
    folder = tmp_path_factory.mktemp("thumos14")
    data = convert("simulated,width=4,difficulty=hard", folder / "data")
    test = data.subset("test").recordings[0].name
    (folder / "data" / "features" / "test" / "flow" / f"{test}.npy").unlink()
    done = call(folder, "--seeds", "1", *settings())
    assert done.returncode == 0, done.stderr
    return folder, done


def test_tables_are_whole(rehearsal):
    folder, _ = rehearsal
    report = json.loads((folder / "out" / "thumos14.json").read_text())
    assert (report["done"], report["all"]) == (24, 24)
    rows = {(r["recipe"], r["loss"], r["protocol"]) for r in report["rows"]}
    losses = {"cross-entropy", "focal", "dis", "d2net", "l1", "bce"}
    recipes, protocols = {"thumos14-paper", "thumos14-release"}, {"activitynet", "wtalc"}
    assert rows == {(r, x, p) for r in recipes for x in losses for p in protocols}
    for row in report["rows"]:
        (run,) = row["runs"]
        assert set(run["map"]) == {"0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7"} and run["training_seconds"] > 0
        assert run["refined"]["map"]["0.5"] == run["map"]["0.5"] and 0 <= run["raw"]["auc"] <= 100
    assert report["recipes"]["thumos14-release"]["training"]["iterations"] == 20
    text = (folder / "out" / "thumos14.md").read_text()
    assert "nothing here says anything about video" in text and "# Simulated THUMOS14" in text
    assert "| L_Dis | - | - | - | 59.7 | - | - | 32.2 | - | - | - | - | - |" in text  # the paper's row of Table 3
    assert text.count("**D2-Net** (1 seed) | thumos14-paper | wtalc |") == 3  # Tables 1, 3, 4
    assert not list((folder / "out").rglob("*.npy")) and not list((folder / "out").rglob("*.safetensors"))


def test_a_missing_video_is_named(rehearsal):
    folder, done = rehearsal
    report = json.loads((folder / "out" / "thumos14.json").read_text())
    subset = report["data"]["subsets"]["test"]
    (name,) = subset["missing"]
    assert (subset["usable"], subset["listed"], subset["published"]) == (7, 8, "210 to 213")
    text = (folder / "out" / "thumos14.md").read_text()
    for said in (text, done.stdout):
        assert f"Missing: 1: {name}; the segments of missing test videos count as missed" in said


def test_it_goes_on_where_it_stopped(rehearsal):
    folder, _ = rehearsal
    path = folder / "out" / "thumos14.json"
    before = json.loads(path.read_text())["rows"]
    one = folder / "runs" / "thumos14-release" / "dis-wtalc" / "seed-0" / "result.json"
    one.unlink()
    again = call(folder, "--seeds", "1", *settings())
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("mAP@0.5") == 1 and "thumos14-release, dis-wtalc, seed 0" in again.stdout
    assert json.loads(path.read_text())["rows"] == before


def test_other_settings_are_refused_in_one_line(rehearsal):
    folder, _ = rehearsal
    other = call(folder, "--seeds", "1", *settings("training.iterations=21"))
    assert other.returncode == 2 and other.stderr.startswith("error: ") and other.stderr.count("\n") == 1
    assert "holds another study (recipe.training.iterations was 20 and is 21)" in other.stderr
