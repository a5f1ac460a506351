"""What a command writes never takes the place of what it reads, of a run's own files, or of another d2net's."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from d2net.checkpoint import load_checkpoint, save_checkpoint
from d2net.cli import app
from d2net.cli.outputs import RUN_FILES
from d2net.files import LOCK_NAME

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
DEVICE = ("--device", "cpu")
SMALL = ("--set", "training.iterations=2", "--set", "training.batch_size=2", "--set", "model.embedding_dim=8")


def run(*arguments: object, code: int = 0) -> str:
    """What a command says, which ends with that exit code; an exception that escapes it fails the test."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "120", "D2NET_DEBUG": None})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stderr if code else result.stdout


def fails(*arguments: object) -> str:
    """The line of the error with which a command ends, after notes alone."""
    *notes, line = run(*arguments, code=2).splitlines()
    assert line.startswith("error: ") and all(n.startswith("note: ") for n in notes)
    return line


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, ``data``, and a model of it, ``run``."""
    root = tmp_path_factory.mktemp("made")
    (root / "data" / "features").mkdir(parents=True)
    rng = np.random.default_rng(0)
    database: dict[str, Any] = {}
    for i in range(6):
        subset, label = ("train", "test")[i % 2], ("Jump", "Run")[i // 2 % 2]
        segment = {"segment": [1.0, 5.0], "label": label}
        database[f"v{i}"] = {"subset": subset, "duration": 25.6, "annotations": [segment]}
        np.save(root / "data" / "features" / f"v{i}.npy", rng.random((40, 4), np.float32))
    truth = {"fps": 25, "stride": 16, "database": database}
    (root / "data" / "gt.json").write_text(json.dumps(truth))
    train = ["train", "--data", root / "data", "--recipe", "watch", "--out", root / "run", *DEVICE, *SMALL]
    run(*train)
    run("localize", root / "run", "--data", root / "data", "--out", root / "found.json", *DEVICE)
    (root / "run" / "log.jsonl").touch()
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy of it that may be damaged."""
    shutil.copytree(made, tmp_path / "p")
    (tmp_path / "p" / "link").symlink_to(tmp_path / "p" / "data")
    os.link(tmp_path / "p" / "data" / "gt.json", tmp_path / "p" / "hard.json")
    return tmp_path / "p"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


LOCALIZE = ("localize", "P/run", "--data", "P/data", *DEVICE, "--out")
EVALUATE = ("evaluate", "P/found.json", "--annotations", "P/data", "--json")
PLOT = ("plot", "P/run", "--data", "P/data", *DEVICE, "--out")


@pytest.mark.parametrize(
    ("command", "out"),
    [
        *((LOCALIZE, f"P/run/{name}") for name in RUN_FILES),
        *((EVALUATE, f"P/run/{name}") for name in RUN_FILES),
        *((LOCALIZE, out) for out in ("P/data/gt.json", "P/link/gt.json", "P/hard.json", "P/new/study.json")),
        *((EVALUATE, out) for out in ("P/data/gt.json", "P/link/gt.json", "P/hard.json", "P/found.json")),
        (("localize", "P/run", "--data", "P/link", *DEVICE, "--out"), "P/data/gt.json"),
        (("localize", "P/run", "--data", "P/data/gt.json", *DEVICE, "--out"), "P/link/gt.json"),
        (("localize", "P/run", "--data", "simulated:P/data/gt.json", *DEVICE, "--out"), "P/data/gt.json"),
        (("localize", "P/run", "--data", "simulated,width=8:P/data/gt.json", *DEVICE, "--out"), "P/data/gt.json"),
        (("localize", "P/m.json", "--data", "P/data", *DEVICE, "--out"), "P/m.json"),
        (("plot", "--detections", "P/found.png", "--data", "P/data", *DEVICE, "--out"), "P/found.png"),
        (("plot", "P/run", "--data", "P/data", "--frames", "P/frames", *DEVICE, "--out"), "P/frames/v1/1.png"),
        (("evaluate", "P/found.json", "--annotations", "P/data/gt.json", "--json"), "P/hard.json"),
    ],
)
def test_a_file_that_is_read_or_a_runs_is_not_written(place: Path, command: tuple[str, ...], out: str) -> None:
    (place / "frames" / "v1").mkdir(parents=True)
    (place / "frames" / "v1" / "1.png").touch()
    (place / "found.png").write_bytes((place / "found.json").read_bytes())
    (place / "m.json").write_bytes((place / "run" / "checkpoint.safetensors").read_bytes())
    before = contents(place)
    said = fails(*(a.replace("P/", f"{place}/") for a in (*command, out)))
    assert said.endswith("give another path") and out.rpartition("/")[2] in said
    assert contents(place) == before


@pytest.mark.parametrize(
    ("command", "out"),
    [*((LOCALIZE, f"P/d{suffix}") for suffix in ("", ".txt", ".jsonl", ".json.gz")), (EVALUATE, "P/e.csv")],
)
def test_a_suffix_that_is_not_written(place: Path, command: tuple[str, ...], out: str) -> None:
    said = fails(*(a.replace("P/", f"{place}/") for a in (*command, out)))
    assert "cannot be written as" in said and "name it .json" in said
    assert not Path(out.replace("P/", f"{place}/")).exists()


@pytest.mark.parametrize("out", ["P/run/d.json", "P/run/D.CSV", "P/data/new.json", "P/found.json"])
def test_other_files_are_written_again(place: Path, out: str) -> None:
    for _ in range(1 if "data" in out else 2):
        run(*(a.replace("P/", f"{place}/") for a in (*LOCALIZE, out)))


def test_detections_in_a_run_within_the_dataset_are_written_again(place: Path) -> None:
    (place / "run").rename(place / "data" / "run")
    for _ in range(2):
        run("localize", place / "data" / "run", "--data", place / "data", *DEVICE, "--out", place / "data/run/d.json")


@pytest.mark.parametrize(
    "command",
    [
        ("train", "--data", "P/data", "--recipe", "watch", "--out", "P/link"),
        ("train", "--data", "simulated:P/o/log.jsonl", "--recipe", "watch", "--out", "P/o"),
        ("train", "--data", "simulated,width=4:P/o/log.jsonl", "--recipe", "watch", "--out", "P/o"),
        ("study", "ablation", "--data", "simulated:P/o/ablation.json", "--out", "P/o"),
        ("study", "condition-number", "--data", "simulated:P/o/summary.json", "--out", "P/o"),
        ("study", "condition-number", "--data", "P/data", "--out", "P/data"),
        ("study", "condition-number", "--data", "P/data", "--checkpoint-run", "P/s/training", "--out", "P/s"),
        ("study", "condition-number", "--data", "P/data", "--out", "P/t"),
        ("convert", "P/link", "P/data"),
    ],
)
def test_a_folder_that_is_read_or_anothers_is_not_written(place: Path, command: tuple[str, ...]) -> None:
    (place / "o").mkdir()
    for name in ("log.jsonl", "ablation.json", "summary.json"):
        (place / "o" / name).write_bytes((place / "data" / "gt.json").read_bytes())
    for folder in ("s", "t"):  # of a study, and a user's own run of that name
        shutil.copytree(place / "run", place / folder / "training")
    (place / "s" / "summary.json").write_text("{}")
    before = contents(place)
    said = fails(*(a.replace("P/", f"{place}/") for a in command))
    assert "is read here; give another" in said or "is of no such study" in said
    assert contents(place) == before


@pytest.mark.parametrize(("command", "out"), [(LOCALIZE, "d.json"), (EVALUATE, "e.json"), (PLOT, "p.png")])
def test_no_file_is_written_where_another_d2net_writes(place: Path, command: tuple[str, ...], out: str) -> None:
    lock = place / "run" / LOCK_NAME
    lock.write_text("4321\n")
    arguments = [a.replace("P/", f"{place}/") for a in (*command, f"P/run/{out}")]
    with open(lock) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        option = command[-1]
        said = fails(*arguments)
        assert f"is being written by another d2net (pid 4321); wait for it or choose another {option}" in said
        assert not (place / "run" / out).exists()
    run(*arguments)  # what a dead one left is no lock
    assert (place / "run" / out).exists()


@pytest.mark.skipif(importlib.util.find_spec("seglearn") is None, reason="seglearn ships the recordings")
def test_a_demo_replaces_no_other_run(place: Path) -> None:
    before = contents(place / "run")
    said = fails("demo", "--out", place / "run", "--iterations", 1)
    assert "a checkpoint is there already, of 'data' by recipe 'watch'" in said and "another --out" in said
    assert contents(place / "run") == before

    out = place / "demo"
    run("demo", "--out", out, "--iterations", 1)
    run("demo", "--out", out, "--iterations", 2)
    there = load_checkpoint(out)
    another = there.recipe.override(["model.dropout=0.25"])  # of the same dataset
    save_checkpoint(out / "checkpoint.safetensors", replace(there, recipe=another))
    assert "which is no demo's" in fails("demo", "--out", out, "--iterations", 1)


def test_a_training_goes_on_without_its_log(place: Path) -> None:
    (place / "new" / "log.jsonl").mkdir(parents=True)
    run("train", "--data", place / "data", "--recipe", "watch", "--out", place / "new", *DEVICE, *SMALL)
    assert (place / "new" / "checkpoint.safetensors").exists()
