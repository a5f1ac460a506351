"""Whatever recordings, classes and files are called, a command writes in its ``--out`` and nowhere else.

Every command that writes runs in a folder of its own, which holds its data, the user's HOME, TMPDIR and the working
directory. What is there before and after is compared. The demo, whose names are d2net's own, is not among them.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import matplotlib.font_manager  # noqa: F401 (it makes its cache in HOME when it is imported first, here before)
import numpy as np
import pytest
from typer.testing import CliRunner

from d2net.cli import app

pytestmark = pytest.mark.usefixtures("one_thread")

# Of recordings and classes, which stand in a JSON; HERE becomes the absolute path of the folder.
NAMES = (
    "../../x", "../../../../x", "HERE/planted", "HERE/home/.bashrc", "..\\..\\x", "a/../../b", "..", ".", "~/x",
    "$HOME/x", "$(touch x)", "`touch x`", "; touch x", "a\0b", "a\nb", "CON", "nul.txt", "C:\\x", "x" * 300, "-rf",
    "--out=x", "\uff0e\uff0e\uff0fx", "\u2025/y", "%2e%2e%2fx", "file:///x", "\u202ex", "e\u0301",
)  # fmt: skip
# Of files, which cannot hold a slash.
FILES = ("..\\..\\x", "$HOME", "$(touch x)", "CON", "-rf", "\uff0e\uff0e\uff0fx", "%2e%2e%2fx", "...", "~")
SMALL = (
    "training.iterations=2", "training.batch_size=2", "training.max_snippets=50", "model.embedding_dim=8",
    "localization.thresholds=[0.1]",
)  # fmt: skip


def state(folder: Path) -> dict[str, tuple[int, ...]]:
    """Every file, folder and link, with what changes when it is written or replaced. A folder's time may change."""
    found = {}
    for where, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(where, name)
            of = os.lstat(path)
            found[path] = (of.st_mode, of.st_ino) + ((of.st_size, of.st_mtime_ns) if name in files else ())
    return found


def is_possible(name: str) -> bool:
    """Whether it can be the name of a file, and in a CSV."""
    return not set(name) & set("/\\\0\n\u202e;") and bool(name.strip(".")) and len(name) < 200


class Sandbox:
    def __init__(self, here: Path) -> None:
        self.here = here
        for name in ("home", "tmp", "deep/er/work", "deep/er/data"):
            (here / name).mkdir(parents=True)
        (here / "home/.bashrc").write_text("precious")
        self.work, self.data = here / "deep/er/work", here / "deep/er/data"
        self.names = [name.replace("HERE", str(here)) for name in NAMES]

    def run(self, *arguments: object, writes: tuple[Path, ...], codes: tuple[int, ...] = (0,)) -> str:
        """Run a command; only ``writes`` and what lies in them may have changed."""
        before = state(self.here)
        result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
        after = state(self.here)
        assert result.exit_code in codes and isinstance(result.exception, (SystemExit, type(None))), result.output
        changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
        beside = {path for path in changed if not any(Path(path).is_relative_to(each) for each in writes)}
        assert not beside, (arguments, beside)
        assert changed or codes != (0,), "a command that writes nothing shows nothing"
        return result.output


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    return Sandbox(tmp_path_factory.mktemp("sandbox"))


@pytest.fixture(autouse=True)
def _within(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sandbox.work)
    for variable, folder in (("HOME", "home"), ("TMPDIR", "tmp"), ("XDG_CACHE_HOME", "home/.cache")):
        monkeypatch.setenv(variable, str(sandbox.here / folder))
    monkeypatch.setattr(tempfile, "tempdir", str(sandbox.here / "tmp"))


@pytest.fixture(scope="module")
def annotations(sandbox: Sandbox) -> Path:
    """Two recordings of each name, one for training; each name is a class too."""
    database = {
        name + end: {"subset": subset, "duration": 40.0, "annotations": [{"segment": [2, 30], "label": name}]}
        for subset, end in (("train", ""), ("test", " 2"))
        for name in sandbox.names
    }
    path = sandbox.data / "gt.json"
    path.write_text(json.dumps({"name": "../../set", "database": database}))
    return path


@pytest.fixture
def run(sandbox: Sandbox, annotations: Path) -> Path:
    """A trained network of all these classes."""
    out = sandbox.work / "run"
    if not out.exists():
        sets = [word for setting in SMALL for word in ("--set", setting)]
        sandbox.run("train", "--data", f"simulated:{annotations}", "--recipe", "watch", "--out", out, *sets,
                    "--subset", "train", "--eval-every", 2, "--eval-subset", "test", "--device", "cpu",
                    writes=(out,))  # fmt: skip
    return out


def test_a_training_and_what_it_found(sandbox: Sandbox, annotations: Path, run: Path) -> None:
    data = ("--data", f"simulated:{annotations}", "--subset", "test", "--device", "cpu")
    found = sandbox.work / "found.json"
    sandbox.run("localize", run, *data, "--out", found, writes=(found, found.with_suffix(".csv")))
    assert set(json.loads(found.read_text())["results"]) == {name + " 2" for name in sandbox.names}
    numbers, page, picture = (sandbox.work / name for name in ("numbers.json", "page.html", "picture.png"))
    sandbox.run("evaluate", found, "--annotations", annotations, "--subset", "test", "--json", numbers,
                writes=(numbers,))  # fmt: skip
    sandbox.run("report", run, "--detections", found, *data, "--out", page, writes=(page,))
    sandbox.run("report", "--detections", found, *data, writes=(sandbox.work / "report.html",))
    shown = [word for name in sandbox.names[:4] for word in ("--video", name + " 2")]
    sandbox.run("plot", run, *data, *shown, "--label", "../../x", "--out", picture, writes=(picture,))
    study = sandbox.work / "study"
    sandbox.run("study", "condition-number", "--out", study, "--samples", 20, "--data", data[1], "--recipe", "watch",
                "--iterations", 2, "--set", SMALL[1], "--set", SMALL[3], "--subset", "train", "--device", "cpu",
                writes=(study,))  # fmt: skip


@pytest.mark.parametrize("layout", ["cola", "plain"])
def test_a_conversion(sandbox: Sandbox, annotations: Path, layout: str) -> None:
    """Names that no file can have are refused; those that one can have are files."""
    source, out = sandbox.data / f"{layout}.json", sandbox.work / layout
    content = json.loads(annotations.read_text())
    said = sandbox.run("convert", f"simulated:{annotations}", out, "--layout", layout, writes=(), codes=(2,))
    assert "cannot be the name of a file" in said and not out.exists()
    possible = {name: value for name, value in content["database"].items() if is_possible(name)}
    for i, value in enumerate(possible.values()):
        value["annotations"] = [{"segment": [2, 30], "label": f"class {i}"}]
    source.write_text(json.dumps({**content, "database": possible}))
    sandbox.run("convert", f"simulated:{source}", out, "--layout", layout, writes=(out,))
    assert len(list(out.rglob("*.npy"))) >= len(possible)


@pytest.mark.parametrize("name", NAMES)
def test_a_study_of_any_variant(sandbox: Sandbox, annotations: Path, name: str) -> None:
    out = sandbox.work / "ablation"
    variant = f"{name.replace('HERE', str(sandbox.here))}:loss.alpha_video=0"
    sandbox.run("study", "ablation", "--data", f"simulated:{annotations}", "--out", out, "--recipe", "watch",
                "--seeds", 1, "--variant", variant, *(w for s in SMALL[:4] for w in ("--set", s)), "--subset", "train",
                "--eval-subset", "test", "--device", "cpu", writes=(out,), codes=(0, 2))  # fmt: skip


def test_features_and_predictions(sandbox: Sandbox, run: Path) -> None:
    sensors, arrays = sandbox.data / "sensors", sandbox.data / "arrays"
    sensors.mkdir(), arrays.mkdir()
    random = np.random.default_rng(0)
    width = 2048
    for name in FILES:
        rows = "".join(f"{i / 50},{x:.3f},{x * 2:.3f},{1 - x:.3f}\n" for i, x in enumerate(random.random(200)))
        (sensors / f"{name}.csv").write_text("time,ax,ay,az\n" + rows)
        np.save(arrays / f"{name}.npy", random.random((20, width), np.float32))
    out = sandbox.work / "features"
    sandbox.run("features", sensors, "--out", out, "--extractor", "windows", writes=(out,), codes=(0, 1))
    assert {path.stem for path in out.glob("*.npy")} >= {"CON", "-rf", "$HOME"}
    # A folder of features that another has filled: what it says of recordings leads nowhere.
    about = json.loads((out / "features.json").read_text())
    entry = next(iter(about["recordings"].values()))
    about["recordings"] |= {name: {**entry, "source": name} for name in sandbox.names}
    (out / "features.json").write_text(json.dumps(about))
    sandbox.run("features", sensors, "--out", out, "--extractor", "windows", writes=(out,), codes=(0, 1, 2))
    found = sandbox.work / "found"
    sandbox.run("predict", run, arrays, "--out", found, "--seconds-per-snippet", 0.64, "--device", "cpu",
                writes=(found,), codes=(0, 1))  # fmt: skip
    assert "CON" in json.loads((found / "detections.json").read_text())["results"]


def test_no_link_in_an_output_is_followed(sandbox: Sandbox, run: Path) -> None:
    """``predict`` makes features of what is no feature, in a folder within its output."""
    elsewhere, found = sandbox.data / "elsewhere", sandbox.work / "linked"
    elsewhere.mkdir(), found.mkdir()
    (found / "features").symlink_to(elsewhere)
    np.save(elsewhere / "x.npy", np.zeros((20, 2048), np.float32))
    said = sandbox.run("predict", run, elsewhere / "x.npy", "--out", found, "--seconds-per-snippet", 0.64,
                       "--device", "cpu", writes=(), codes=(2,))  # fmt: skip
    assert "linked/features: a symbolic link, which is not followed" in said


def test_what_is_written_beside_is_seen(sandbox: Sandbox, run: Path) -> None:
    """The check itself: outputs that are not said to be some."""
    found = sandbox.here / "away.json"
    command = ("localize", run, "--data", f"simulated:{sandbox.data / 'gt.json'}", "--subset", "test", "--out", found)
    with pytest.raises(AssertionError, match=r"away\.csv"):
        sandbox.run(*command, writes=(found,))
