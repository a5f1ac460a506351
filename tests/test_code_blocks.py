"""Every block of code of the README and of docs/ is run by a test, or stands here with why it cannot be.

What can be run in seconds is run here, in a folder with a small dataset and a network that was trained on it. Of every
block of shell, also of those that take hours or other machines, the shell is run with commands that only note how they
were called, and the options of d2net are read as d2net reads them.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from d2net.checkpoint import load_model
from d2net.cli import app
from d2net.data import open_dataset
from d2net.detections import read_detections
from d2net.localization import localize
from d2net.recipes import load_recipe
from d2net.studies.ablation import parse_variant

ROOT = Path(__file__).parents[1]
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")), *sorted(ROOT.glob("docs/*.md"))]

# Pages of which a test goes through every block, whatever comes.
WHOLE = {f"docs/{name}.md": "test_guides.py" for name in ("migrate", "own-method", "tutorial")}

# (page, language): how many of its blocks another test runs, and which.
ELSEWHERE = {
    ("docs/data.md", "json"): (1, "data/test_data_document.py"),
    ("docs/data.md", "python"): (5, "data/test_data_document.py"),
    ("docs/features.md", "python"): (1, "features/test_features_document.py"),
    ("docs/own-data.md", "csv"): (2, "test_own_data.py"),
    ("docs/own-data.md", "json"): (1, "test_own_data.py"),
    ("docs/own-data.md", "python"): (1, "test_own_data.py"),  # the last, a program
    ("docs/own-data.md", "sh"): (11, "test_own_data.py"),
    ("docs/own-data.md", "yaml"): (1, "test_own_data.py"),
    ("docs/packed.md", "python"): (1, "test_packed_document.py"),
    ("docs/scale.md", "python"): (1, "test_scale_document.py"),
    ("docs/scale.md", "sh"): (5, "test_scale_document.py"),  # as torchrun takes them
    ("docs/studies.md", "python"): (3, "test_study_workers.py"),
}

# (page, language): how many blocks are run here: the first ones, but for those of NOT_RUN.
HERE = {
    ("README.md", "python"): 1,
    ("README.md", "sh"): 1,
    ("docs/data.md", "sh"): 3,
    ("docs/evaluation.md", "csv"): 1,
    ("docs/evaluation.md", "json"): 1,
    ("docs/evaluation.md", "sh"): 1,
    ("docs/install.md", "sh"): 1,
    ("docs/operators.md", "python"): 5,
    ("docs/own-data.md", "python"): 2,
    ("docs/plots.md", "sh"): 1,
    ("docs/report.md", "python"): 1,
    ("docs/report.md", "sh"): 1,
    ("docs/simulated.md", "sh"): 1,
}

PIP = "pip and a network; .ci/run installs so"
HOURS = "a study: hours, or minutes at best"
WEIGHTS = "I3D's published weights; tests/features runs the commands with others"
# (page, first line): why a block is not run.
NOT_RUN = {
    ("README.md", "pip install -c constraints.txt '.[demo]' && d2net demo"): PIP,
    ("README.md", "pip install -c constraints.txt '.[test]' && pytest"): PIP,
    ("CONTRIBUTING.md", "python -m venv .venv"): PIP,
    ("CONTRIBUTING.md", "def _forward(native, x, by):"): "of an operator that is not there",
    ("SECURITY.md", "pip install torch==2.13.0"): PIP,
    ("docs/benchmarks.md", "for b in benchmarks/bench_*.py; do"): "minutes; tests/test_benchmarks.py runs them small",
    ("docs/demo.md", "d2net demo"): "a minute; tests/test_cli.py runs the demo, tests/test_plot.py such a picture",
    ("docs/demo.md", "d2net study ablation --data watch --cross-validate --folds 3"): HOURS,
    ("docs/demo.md", "d2net study ablation --data watch --cross-validate --seeds 1 --out runs/watch-loss"): HOURS,
    ("docs/features.md", "pip install '.[video]'"): PIP,
    ("docs/features.md", "torchrun --nproc-per-node 4 -m d2net features videos/"): WEIGHTS,
    ("docs/features.md", "pip install -c constraints.txt '.[video,report]'"): WEIGHTS,
    ("docs/features.md", "d2net features wrist/"): "features/test_features_document.py runs its line",
    ("docs/fidelity.md", 'THRESHOLDS="localization.thresholds'): HOURS,
    ("docs/gpu.md", "bash benchmarks/gpu_check.sh"): "a GPU; .ci/run has the dry run",
    ("docs/index.md", "pip install -c constraints.txt '.[demo]'"): PIP,
    ("docs/install.md", "pip install 'd2net-0.2.0-cp311"): PIP,
    ("docs/install.md", "pip install -c constraints.txt '.[demo]'"): PIP,
    ("docs/plots.md", "d2net demo"): "as in docs/demo.md",
    ("docs/reliability.md", "python tests/reliability/kills.py"): "minutes; tests/reliability runs them small",
    ("docs/studies.md", "d2net study ablation --data watch --set loss.alpha_snippet=0.01"): HOURS,
    ("docs/studies.md", "d2net study ablation --data watch --seeds 3 --out runs/ablation --workers 4"): HOURS,
    ("docs/studies.md", 'OFF="loss.alpha_snippet=0 loss.alpha_video=0"'): HOURS,
    ("docs/studies.md", 'LATE="training.denoising_start=300"'): HOURS,
    ("docs/studies.md", "d2net study condition-number"): HOURS,
    ("docs/thumos14.md", "benchmarks/thumos14.sh FEATURES"): "THUMOS14's features",
    ("docs/thumos14.md", "d2net convert simulated"): "minutes; tests/test_thumos14_benchmark.py runs it smaller",
}

NO_CODE = {"text"}  # drawings, and what a program said
OTHERS = ("bash", "mkdocs", "nox", "pip", "pre-commit", "pytest", "python", "scontrol", "srun", "torchrun")  # and d2net
COMMAND: Any = typer.main.get_command(app)

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(NamedTuple):
    page: str
    language: str
    text: str

    @property
    def reason(self) -> str | None:
        """Why it is not run."""
        found = [why for (page, begin), why in NOT_RUN.items() if page == self.page and self.text.startswith(begin)]
        return found[0] if found else None

    def __str__(self) -> str:
        return f"{self.page}: {self.text.splitlines()[0]}"


def blocks_of(path: Path) -> list[Block]:
    found = re.findall(r"^( *)```(\w*)\n(.*?)^ *```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    name = path.relative_to(ROOT).as_posix()
    return [Block(name, language, textwrap.dedent(text)) for _, language, text in found]


BLOCKS = [block for path in PAGES for block in blocks_of(path) if block.language not in NO_CODE]
SHELL = [block for block in BLOCKS if block.language == "sh"]


def run_here(page: str, language: str) -> list[str]:
    """The blocks of a page that are run by this file, in order."""
    found = [b.text for b in BLOCKS if (b.page, b.language) == (page, language) and b.reason is None]
    return found[: HERE[page, language]]


# --- Every block has its test -----------------------------------------------------------------------------------------


def test_every_block_has_a_test_or_a_reason():
    wanted: dict[tuple[str, str], int] = {}
    for block in BLOCKS:
        if block.reason is None and block.page not in WHOLE:
            key = block.page, block.language
            wanted[key] = wanted.get(key, 0) + 1
    keys = ELSEWHERE.keys() | HERE.keys()
    assert wanted == {key: ELSEWHERE.get(key, (0,))[0] + HERE.get(key, 0) for key in keys}


def test_the_reasons_are_of_blocks_that_there_are():
    for page, begin in NOT_RUN:
        assert any(b.page == page and b.text.startswith(begin) for b in BLOCKS), f"{page}: {begin}"


def test_the_tests_elsewhere_read_the_page():
    for page, test in {*WHOLE.items(), *((page, test) for (page, _), (_, test) in ELSEWHERE.items())}:
        assert page.rpartition("/")[2] in (ROOT / "tests" / test).read_text(encoding="utf-8"), test


# --- The shell, without what it calls ---------------------------------------------------------------------------------


def calls(shell: str, folder: Path) -> list[list[str]]:
    """How a block of shell calls its programs: words as they get them."""
    note = folder / "calls"
    note.write_text("")
    script = f"#!/bin/sh\nprintf '%s\\0' \"${{0##*/}}\" \"$@\" >>'{note}'\nprintf '\\036' >>'{note}'\n"
    (folder / "bin").mkdir()
    (folder / "benchmarks").mkdir()
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    for path in ("bin/d2net", *(f"bin/{name}" for name in OTHERS), "benchmarks/thumos14.sh", "benchmarks/bench_x.py"):
        (folder / path).write_text(script)
        (folder / path).chmod(0o755)
    path = f"{folder / 'bin'}:/usr/bin:/bin"
    done = subprocess.run(["/bin/bash", "-ec", shell], cwd=folder, env={"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [call.split("\0")[:-1] for call in note.read_text().split("\036")[:-1]]


def arguments(call: list[str]) -> list[str] | None:
    """Those of d2net, whether alone or below torchrun or Python; None: another program."""
    if call[0] == "d2net":
        return call[1:]
    for i in range(len(call) - 1):
        if call[i : i + 2] == ["-m", "d2net"]:
            return call[i + 2 :]
    return None


def read(words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The command, and its options as d2net reads them."""
    command, name = COMMAND, []
    while hasattr(command, "commands"):
        name.append(words[0])
        command, words = command.commands[words[0]], words[1:]
    return name, command.make_context(name[-1], words).params


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_shell_calls_d2net_as_it_is_called(block, tmp_path):
    made = calls(block.text, tmp_path)
    assert made
    for words in filter(None, map(arguments, made)):
        name, options = read(words)
        if name == ["study", "ablation"]:
            recipe = load_recipe(options["recipe"] or "watch")
            for text in options["variant"] or [""]:
                settings = [*(options["settings"] or []), *(parse_variant(text).settings if text else [])]
                recipe.override([s for s in settings if not s.startswith("watch.")])  # those are of the data


# --- The blocks themselves --------------------------------------------------------------------------------------------


def d2net(*words: object) -> None:
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "120"})
    assert result.exit_code == 0, f"{words}\n{result.output}"


def quick(words: list[str]) -> list[str]:
    """Another network would be trained in the same way for longer."""
    given = any(word.startswith("training.iterations=") for word in words)
    return [*words, "--set", "training.iterations=3"] if words[0] == "train" and not given else words


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder as the pages take for granted: recordings, a network that was trained on them, detections."""
    folder = tmp_path_factory.mktemp("made")
    data, rng = folder / "my-data", np.random.default_rng(0)
    data.mkdir()
    labels, segments = ["recording,labels,subset"], ["recording,label,start,end"]
    database: dict[str, Any] = {}
    for i, name in enumerate(("rec-01", "rec-02", "rec-03", "rec-04", "rec-21", "rec-22")):
        label, subset = ("jump", "throw")[i % 2], "train" if i < 4 else "test"
        np.save(data / f"{name}.npy", rng.normal(size=(40, 12)).astype(np.float32))
        labels.append(f"{name},{label},{subset}")
        segments.append(f"{name},{label},4,9")
        database[name] = {"subset": subset, "duration": 20, "annotations": [{"segment": [4, 9], "label": label}]}
    (data / "labels.csv").write_text("\n".join(labels))
    (data / "segments.csv").write_text("\n".join(segments))
    (data / "features.json").write_text('{"seconds_per_snippet": 0.5}')
    d2net(*quick(["train", "--data", str(data), "--out", str(folder / "runs/mine")]))
    d2net("localize", folder / "runs/mine", "--data", data, "--out", folder / "detections.json")
    # Under the other names of the pages.
    for name in ("DATA", "features", "anet13"):
        shutil.copytree(data, folder / name)
    shutil.copy(folder / "detections.json", folder / "theirs.json")
    for name, subset in (("gt", "test"), ("anet", "validation"), ("anet13", "test")):
        text = json.dumps({"database": database})
        (folder / f"{name}.json").write_text(text.replace('"test"', f'"{subset}"'))
    (folder / "videos").mkdir()
    (folder / "videos" / "rec-21.mp4").touch()  # a page has the way to it, no more
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Path:
    """A copy of it, which is the working folder."""
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "place"))
    return tmp_path


def run_shell(page: str, folder: Path) -> None:
    """Every d2net of a page's blocks, in order."""
    for number, text in enumerate(run_here(page, "sh")):
        (folder / str(number)).mkdir()
        for words in filter(None, map(arguments, calls(text, folder / str(number)))):
            name, options = read(words)
            if name == ["demo"]:  # tests/test_cli.py runs it
                continue
            if name[0] in ("train", "convert"):
                shutil.rmtree(options["out"], ignore_errors=True)
            d2net(*quick(words))


def run_python(page: str, **names: Any) -> dict[str, Any]:
    for text in run_here(page, "python"):
        exec(compile(text, page, "exec"), names)
    return names


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{name}.md" for name in ("evaluation", "install", "plots", "report", "simulated"))]
)
def test_shell(page, place):
    run_shell(page, place)


def test_shell_of_data(place):
    (example,) = [b.text for b in BLOCKS if b.page == "docs/data.md" and "my-wtalc/Mine-Annotations" in b.text]
    exec(compile(example, "docs/data.md", "exec"), {})
    Path("my-wtalc").rename("W-TALC-FOLDER")
    run_shell("docs/data.md", place)


@pytest.mark.parametrize("page", ["README.md", "docs/own-data.md"])
def test_python_of_a_trained_network(page, place):
    assert run_python(page)["detections"].classes == ("jump", "throw")


def test_python_of_operators():
    names = run_python("docs/operators.md")
    assert names["pooled"].shape == (4, 20) and names["loss"].reference is names["model"].x_ref
    assert names["result"].total.isfinite()


def test_python_of_a_report(place):
    model, dataset = load_model("runs/mine"), open_dataset("my-data", subsets=["test"])
    run_python("docs/report.md", model=model, dataset=dataset, detections=localize(model, dataset))
    assert "rec-21" in Path("report.html").read_text(encoding="utf-8")


def test_the_files_of_detections(tmp_path):
    (found,), (row,) = run_here("docs/evaluation.md", "json"), run_here("docs/evaluation.md", "csv")
    (tmp_path / "a.json").write_text(found)
    (tmp_path / "a.csv").write_text(row)
    a, b = read_detections(tmp_path / "a.json"), read_detections(tmp_path / "a.csv")
    assert a.videos == ("video_1", "video_2") and b.videos == ("video_1",)
    assert (a.score.tolist(), a.start.tolist(), a.end.tolist()) == (b.score.tolist(), b.start.tolist(), b.end.tolist())
