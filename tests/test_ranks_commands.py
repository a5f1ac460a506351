"""localize, predict and features in several processes, as torchrun starts them: the bytes of one, and one message."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import d2net
from d2net.cli import app
from d2net.shares import deal

pytestmark = pytest.mark.usefixtures("one_thread")
SENSORS = ("--extractor", "windows", "--columns", "ax,ay,az")


def command(*arguments: object) -> tuple[int, str]:
    """In this process, alone."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    return result.exit_code, result.stdout


def start(ranks: int, *program: object) -> subprocess.Popen[str]:
    """``torchrun PROGRAM``, which is ``-m d2net ...`` or a file; each rank computes in one thread."""
    runs = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, *program)
    place = os.pathsep.join([str(Path(d2net.__file__).parents[1]), *sys.path])  # these tests' own d2net
    return subprocess.Popen(
        [str(a) for a in runs],
        env={**os.environ, "PYTHONPATH": place, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def torchrun(ranks: int, *program: object) -> tuple[int, str, list[str]]:
    """Exit code, stdout, and the messages of d2net on stderr, among those of torchrun."""
    process = start(ranks, *program)
    out, err = process.communicate(timeout=400)
    ours = ("error:", "rank ", "note:", "failed:", "interrupted", "Usage")
    return process.returncode, out, [line for line in err.splitlines() if line.startswith(ours)]


def write_signal(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(int(rng.integers(300, 2000)), 3))
    x[len(x) // 4 : len(x) // 2] += 5
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["t", "ax", "ay", "az"])
        writer.writerows([f"{i / 50:.2f}", *map("{:.4f}".format, row)] for i, row in enumerate(x))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``signals/``, one of them bad, ``features/`` of them, ``run/`` trained on these; ``mixed/`` has short and long
    recordings."""
    place = tmp_path_factory.mktemp("ranks")
    (place / "signals").mkdir()
    for i in range(7):
        write_signal(place / "signals" / f"r{i}.csv", i)
    (place / "signals" / "bad.csv").write_text("t,ax,ay,az\n0,1,2,x\n")
    code, said = command("features", place / "signals", "--out", place / "features", *SENSORS)
    assert code == 1 and "wrote features of 7 recordings" in said and "1 failed: 'bad'" in said
    shutil.copytree(place / "features", place / "mixed")
    lines = ["recording,labels,subset", *(f"r{i},{'jump;run' if i % 2 else 'run'},train" for i in range(7))]
    lines += [f"m{i:02},,test" for i in range(60)]
    rng = np.random.default_rng(0)
    for i in range(60):  # 8,192 rows run together at most
        length = 3000 if i % 15 == 7 else rng.integers(2, 300)
        values = rng.normal(size=(length, 48)).astype(np.float32)
        values[length // 4 : length // 2] += 2
        np.save(place / "mixed" / f"m{i:02}.npy", values)
    (place / "mixed" / "labels.csv").write_text("\n".join(lines) + "\n")
    code, said = command(
        *("train", "--data", place / "mixed", "--out", place / "run", "--recipe", "generic"),
        *("--set", "training.iterations=10", "--set", "training.batch_size=4", "--set", "model.embedding_dim=16"),
    )
    assert code == 0, said
    return place


@pytest.mark.parametrize("ranks", [2, 3])
def test_localize_writes_the_bytes_of_one_process(place: Path, tmp_path: Path, ranks: int) -> None:
    found = ("localize", place / "run", "--data", place / "mixed", "--subset", "all", "--out")
    code, said = command(*found, tmp_path / "one.json")
    assert code == 0 and " of 67 recordings" in said
    code, out, messages = torchrun(ranks, "-m", "d2net", *found, tmp_path / "many.json")
    assert code == 0 and out == said.replace("one.", "many."), messages
    for suffix in (".json", ".csv"):
        content = (tmp_path / "one.json").with_suffix(suffix).read_bytes()
        assert len(content) > 50_000 and (tmp_path / "many.json").with_suffix(suffix).read_bytes() == content


def test_an_error_on_one_rank_is_one_line_that_names_the_recording(place: Path, tmp_path: Path) -> None:
    data = shutil.copytree(place / "mixed", tmp_path / "data")
    values = np.load(data / "m30.npy")
    values[1, 5] = np.nan
    np.save(data / "m30.npy", values)
    options = ("--data", data, "--subset", "all", "--out", tmp_path / "d.json")
    code, _, messages = torchrun(2, "-m", "d2net", "localize", place / "run", *options)
    errors = [line for line in messages if not line.startswith("note:")]
    assert code != 0 and len(errors) == 1, errors
    assert f"error: {data / 'm30.npy'}: features of 'm30' hold NaN or Inf (first at snippet 1)" in errors[0]
    assert not (tmp_path / "d.json").exists()


def each_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """This process as each of two that were started together."""
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        yield rank


@pytest.mark.parametrize("words", [["report", "run"], ["info"], ["study", "condition-number"], ["convert"]])
def test_what_is_no_command_for_ranks_refuses_and_rank_0_says_so(
    monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    for rank in each_rank(monkeypatch):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 2 and result.stdout == ""
        message = f"error: d2net {words[0]} runs in one process; start it without torchrun\n"
        assert result.stderr == (message if rank == 0 else "")


class Interrupted:
    """A module whose import was interrupted: PyTorch says anything then when it is imported anew."""

    def __getattr__(self, name: str) -> object:
        raise RuntimeError("partially initialized")


def test_where_pytorch_cannot_be_imported_rank_0_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "d2net.distributed", Interrupted())
    for rank in each_rank(monkeypatch):
        result = CliRunner().invoke(app, ["report", "run"])
        assert result.exit_code == 2 and ("without torchrun" in result.stderr) == (rank == 0)


@pytest.mark.parametrize("words", [["localize"], ["localize", "--foo"], ["nothing"]])
def test_of_a_command_that_is_wrong_rank_0_speaks(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    for rank in each_rank(monkeypatch):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 2 and ("Usage:" in result.stderr) == (rank == 0)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_features_go_on_with_other_ranks_and_have_the_bytes_of_one_process(place: Path) -> None:
    out, expected = place / "features-again", place / "features"  # the paths of the sources are relative
    shutil.copytree(expected, out)
    said = json.loads((out / "features.json").read_text())
    for name in ("r0", "r2", "r3", "r6"):  # the first was made, but features.json was not written any more
        del said["recordings"][name]
        if name != "r0":
            (out / f"{name}.npy").unlink()
    (out / "features.json").write_text(json.dumps(said))
    (out / "r5.npy").unlink()
    code, out_said, messages = torchrun(2, "-m", "d2net", "features", place / "signals", "--out", out, *SENSORS)
    assert code != 0  # for the bad one
    assert out_said.startswith("wrote features of 5 recordings (") and "; 2 were there already; 1 failed" in out_said
    assert [line for line in messages if line.startswith("failed:")] == [
        f"failed: {place / 'signals' / 'bad.csv'}: has 1 row below its first line; give a recording"
    ]
    found = contents(out)
    assert found == contents(expected) and len(found) == 8


def test_predict_writes_the_bytes_of_one_process(place: Path, tmp_path: Path) -> None:
    found = ("predict", place / "run", *(place / "signals" / f"r{i}.csv" for i in range(7)), "--out", tmp_path / "out")
    code, said = command(*found)
    assert code == 0 and " in 7 recordings to " in said
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    features = contents(tmp_path / "out" / "features")
    shutil.rmtree(tmp_path / "out")
    code, out, messages = torchrun(2, "-m", "d2net", *found)
    assert code == 0 and out == said, messages
    assert contents(tmp_path / "out" / "features") == features and len(features) == 8
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_file()} == files.keys()
    for name in ("detections.json", "detections.csv", "timeline.png"):  # the report tells the time, too
        assert (tmp_path / "out" / name).read_bytes() == files[name]


LONG = """
import os, sys, time
import numpy as np
import d2net.features as package
from d2net.__main__ import main

def extract(path, progress):
    while os.environ["RANK"] == "0":
        progress(0.5)
        time.sleep(0.05)
    return package.Features(np.full((3, 2), len(path.stem)), 1.5, 30.0, (f"a note on {path.stem}",))

about = {"extractor": "mine", "streams": [2], "columns": [["a"]], "rate": 50.0}
package.sensor_method = lambda *_, **__: package.Method(about, extract, frozenset([".csv"]))
main()
"""


def test_ctrl_c_keeps_what_all_ranks_have_done(tmp_path: Path) -> None:
    """Rank 0 stays in its first recording, in which it hears of the three that rank 1 has done."""
    (tmp_path / "in").mkdir()
    for name in "abcdef":
        (tmp_path / "in" / f"{name}.csv").write_text("t,x\n")
    (tmp_path / "long.py").write_text(LONG)
    out = tmp_path / "out"
    process = start(2, tmp_path / "long.py", "features", tmp_path / "in", "--out", out, "--extractor", "windows")
    known: list[str] = []
    end = time.monotonic() + 300
    while len(known) < 3 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
        if (out / "features.json").exists():
            known = list(json.loads((out / "features.json").read_text())["recordings"])
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=400)
    assert process.returncode != 0 and known == ["b", "d", "f"], err
    said = [line for line in err.splitlines() if "interrupted" in line]
    assert said == ["interrupted; 3 of 6 recordings are done; the same command goes on with the others"], err
    assert sum("a note on" in line for line in err.splitlines()) == 3
    assert list(json.loads((out / "features.json").read_text())["recordings"]) == known
    assert sorted(contents(out)) == ["b.npy", "d.npy", "f.npy", "features.json"]


CHECKS = """
import json, sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import torch
from d2net import load_model, localize
from d2net.data import find_dataset
from d2net.meeting import joined
from d2net.errors import D2NetError
from d2net.features import Features, Method, write_features

place, out = map(Path, sys.argv[1:])
model = load_model(place / "run")
data = find_dataset(place / "mixed").open(None)
few = replace(data, recordings=data.recordings[:1])
unknown = tuple(replace(r, snippets=None) if i % 3 else r for i, r in enumerate(data.recordings))
unknown = replace(data, recordings=unknown)
said = {}

def same(a, b):
    return all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ("video", "label", "start", "end", "score"))

def message(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except D2NetError as error:
        return [type(error).__name__, str(error)]

def extract(path, progress):
    return Features(np.zeros((1, 2)), 1.0, 1.0)

with joined("cpu") as ranks:
    first = ranks.leads
    for name, each in (("unknown", unknown), ("few", few), ("none", replace(data, recordings=()))):
        steps = []
        found = localize(model, each, ranks=ranks, progress=lambda *x: steps.append(x))
        said[name] = [same(found, localize(model, each)), len(found), len(steps) and steps[-1][0] == steps[-1][1]]
    said["data"] = message(localize, model, data if first else few, ranks=ranks)
    other = load_model(place / "run")
    if not first:
        other.x_ref[0] += 1e-3
    said["network"] = message(localize, other, few, ranks=ranks)
    recipe = replace(model.recipe.localization, nms_iou=0.5 if first else 0.4)
    said["recipe"] = message(localize, model, few, recipe, ranks=ranks)
    method, paths = Method({"streams": [2]}, extract), {"a": place / "signals" / "r0.csv"}
    said["folder"] = message(write_features, paths, method, out / f"folder{ranks.rank}", ranks=ranks)
    paths = paths if first else {"b": paths["a"]}
    said["files"] = message(write_features, paths, method, out / "x", ranks=ranks)
    (out / f"{ranks.rank}.json").write_text(json.dumps(said))
"""


def test_what_differs_between_ranks_is_named_on_rank_0(place: Path, tmp_path: Path) -> None:
    (tmp_path / "checks.py").write_text(CHECKS)
    code, _, messages = torchrun(2, tmp_path / "checks.py", place, tmp_path)
    assert code == 0, messages
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for said in (first, second):
        assert said["unknown"][0] and said["unknown"][1] > 100 and said["unknown"][2]
        assert said["few"][0] and said["few"][1] > 0
        assert said["none"] == [True, 0, 0]
    assert first["few"][2] and second["few"][2] == 0  # rank 1 has nothing to do
    hashes = "has a network with its settings of hash "
    for name, expected in (
        (
            "data",
            ("has data of 1 recording of hash ", "rank 0 has 67 recordings of hash ", "all machines the same data"),
        ),
        ("network", (hashes, "give all machines the same checkpoint")),
        ("recipe", (hashes, "give all machines the same checkpoint")),
        ("folder", (f"{tmp_path / 'folder0'}: rank 1 does not see what rank 0 writes there; give --out a folder ",)),
        ("files", ("has inputs of 1 file, hash ", "give all machines the same files")),
    ):
        kind, text = first[name]
        assert kind == "InputError" and "rank 1 " in text and all(part in text for part in expected), text
        assert second[name][0] == "RankEnded"


def test_shares_are_balanced_and_in_order() -> None:
    assert deal([5, 1, 1, 1, 9, 2], 2) == [[3, 4], [0, 1, 2, 5]]
    for costs, ranks in (([5, 1, 1, 1, 9, 2], 2), ([0] * 7, 3), ([], 2), ([3], 4)):
        shares = deal(costs, ranks)
        assert len(shares) == ranks and sorted(i for share in shares for i in share) == list(range(len(costs)))
        assert all(share == sorted(share) for share in shares)
