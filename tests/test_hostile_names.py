"""Names that hold what a terminal obeys, markup, mathematics, line ends or 5,000 letters, through every command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from d2net.cli import app
from d2net.cli.terminal import make_console
from d2net.errors import InputError
from d2net.words import LINE, escaped, listed, quoted

pytestmark = pytest.mark.usefixtures("one_thread")
EVIL = {
    "terminal": "a\x1b]0;owned\x07\x1b[31m\x1b[2J",
    "C1": "b\x9b2J\x9d0;x\x9c",
    "line": "c\nerror: forged\r\nnote: forged\x85\u2028\x0b\x0c",
    "overwritten": "good\rbad\x08\x08\x7f\t",
    "direction": "\u202egnp.exe\u2066\u200f",
    "unseen": "a\u200bb\ufeffc\u00ad\U000e0041\ue000",
    "markup": "[bold]x[/bold] [link=http://x.org]y[/link] [/] [red :smile: [@click=app.bell]z",
    "mathematics": r"$\frac{1}{ $x_{ \mathrm $$ ^_^ \usepackage",
    "halves": "half \udc80\ud800",
    "long": "x" * 5000,
    "formats": "%s %n {0} {x!r} {",
    "pages": "<script>alert(1)</script> &amp; ]]> -->",
    "cells": '=1+1,"; \\',
}  # fmt: skip
SMALL = ["training.iterations=2", "training.batch_size=2", "training.max_snippets=50", "model.embedding_dim=8"]


def clean(text: str) -> None:
    """Nothing that a terminal obeys or does not show, no forged line, no line without end."""
    for c in text:
        assert c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"), repr(c)
    for line in text.splitlines():
        assert not line.startswith(("error: forged", "note: forged")) and len(line) < 2 * LINE


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "120", "D2NET_DEBUG": None})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    clean(result.stdout)
    clean(result.stderr)
    return result.output


def write_annotations(path: Path, names: dict[str, str]) -> None:
    """Two recordings of each name, one for training; each a class of its name too."""
    database = {}
    for subset, end in (("train\x1b[1m", ""), ("test\nx", " 2")):
        for i, name in enumerate(names.values()):
            rows = [{"segment": [2 + i, 9 + i], "label": name}, {"segment": [20, 22], "label": "ambiguous"}]
            database[name + end] = {"subset": subset, "duration": 40.0, "annotations": rows}
    path.write_text(json.dumps({"name": "set \x1b[5m[/]", "database": database}))


TRAIN, TEST = ("--subset", "train\x1b[1m"), ("--subset", "test\nx")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Path]:
    """A folder, a simulated dataset of all names, and what a network of it found."""
    folder = tmp_path_factory.mktemp("hostile")
    write_annotations(folder / "gt.json", EVIL)
    data = f"simulated:{folder / 'gt.json'}"
    sets = [x for s in SMALL for x in ("--set", s)]
    run("train", "--data", data, "--recipe", "watch", "--out", folder / "run", *TRAIN, *sets, "--device", "cpu")
    found = folder / "found.json"
    run("localize", folder / "run", "--data", data, "--out", found, *TEST, "--device", "cpu",
        "--set", "localization.thresholds=[0.1]")  # fmt: skip
    return folder, data, found


def test_the_commands_train_localize_inspect(trained: tuple[Path, str, Path]) -> None:
    folder, data, found = trained
    results = json.loads(found.read_text())["results"]
    assert set(results) == {name + " 2" for name in EVIL.values()}  # exactly, in a file
    assert "\\x1b]0;owned\\x07" in run("inspect", data)
    # Where the one of the two subsets is not said, the names are.
    assert "train\\x1b[1m" in run("localize", folder / "run", "--data", data, "--out", found, code=2)


def test_the_command_evaluate(trained: tuple[Path, str, Path]) -> None:
    folder, data, found = trained
    truth = ("--annotations", folder / "gt.json")
    numbers = folder / "numbers.json"
    run("evaluate", found, *truth, *TEST, "--json", numbers, "--compare", "thumos14", "--features", EVIL["markup"])
    assert set(json.loads(numbers.read_text())["per_class"]) == set(EVIL.values())
    # All names are unknown, and every one is named in an error.
    for i, name in enumerate(EVIL.values()):
        entry = {"label": name + " 3", "score": 1, "segment": [0, 1]}
        other = folder / f"other-{i}.json"
        other.write_text(json.dumps({"results": {name + " 3": [entry]}}))
        assert "do not list 1 recording" in run("evaluate", other, *truth, *TEST, code=2)
        other.write_text(json.dumps({"results": {name + " 2": [entry]}}))
        assert "do not have 1 class" in run("evaluate", other, *truth, *TEST, code=2)
        other.write_text(json.dumps({"results": {name: [{**entry, "label": [name]}]}}))
        assert "not a string" in run("evaluate", other, *truth, *TEST, code=2)


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_the_command_plot(trained: tuple[Path, str, Path], suffix: str) -> None:
    folder, data, found = trained
    chosen = list(EVIL.values())[("png", "pdf", "svg").index(suffix) :: 3]
    videos = [x for name in chosen for x in ("--video", name + " 2")]
    plot = [
        "plot",
        folder / "run",
        "--detections",
        found,
        "--data",
        data,
        *videos,
        "--min-score",
        "0",
        "--device",
        "cpu",
    ]
    names = [x for name in (EVIL["mathematics"], EVIL["terminal"] + EVIL["long"]) for x in ("--label", name)]
    out = folder / f"picture.{suffix}"
    run(*plot, *names, "--out", out)
    content = out.read_bytes()
    if suffix == "png":
        width, height = Image.open(out).size
        assert width == 1400 and height < 10_000
    assert suffix != "svg" or not re.search(rb"[\0-\x08\x0b\x0c\x0e-\x1f]|\xe2\x80\xae|<script", content)
    run("plot", "--detections", found, "--data", data, *TEST, "--video", "nobody\x1b[1m", "--out", out, code=2)


def test_files_of_such_names(tmp_path: Path) -> None:
    """In a folder of files, from where they are converted; a name that no file can have ends in one line."""
    names = {k: v for k, v in EVIL.items() if "/" not in v and len(v) < 100 and "\ud800" not in v}
    data = tmp_path / "data"
    (data / "features").mkdir(parents=True)
    write_annotations(data / "gt.json", names)
    content = json.loads((data / "gt.json").read_text())
    for i, name in enumerate(content["database"]):
        np.save(data / "features" / f"{name}.npy", np.random.default_rng(i).random((40, 6), np.float32) + 0.1)
    (data / "gt.json").write_text(json.dumps({**content, "fps": 1, "stride": 1}))
    assert "\\x1b]0;owned" in run("inspect", data)
    run("train", "--data", data, "--recipe", "watch", "--out", tmp_path / "run", *TRAIN, "--set", SMALL[0], "--set",
        SMALL[1], "--set", SMALL[2], "--device", "cpu")  # fmt: skip
    assert "cannot be the name of a file" in run("convert", data, tmp_path / "out", code=2)
    (data / "features" / f"{names['line']}.npy").unlink()
    assert "left out: 1 of" in run("localize", tmp_path / "run", "--data", data, "--out", tmp_path / "d.json", *TRAIN)
    (data / "features" / f"{names['terminal']}.npy").write_bytes(b"no features")
    run("inspect", data, code=1)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_terminal_that_lacks_letters(trained: tuple[Path, str, Path], encoding: str) -> None:
    folder, data, _ = trained
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C", "COLUMNS": "120"}
    command = [sys.executable, "-m", "d2net", "--debug", "evaluate", folder / "other.json", "--annotations"]
    (folder / "other.json").write_text(json.dumps({"results": {EVIL["halves"] + "é…\x1b[1m日": []}}))
    subset = "nö\udcff\x1b[1m" if encoding == "ascii" else "test\nx"
    done = subprocess.run(
        [*command, folder / "gt.json", "--subset", subset], env=environment, capture_output=True, cwd=folder
    )
    assert done.returncode in (0, 2) and b"UnicodeEncodeError" not in done.stderr
    clean(done.stdout.decode() + done.stderr.decode())


def test_usage_errors(tmp_path: Path) -> None:
    for arguments in (["\x1b[31m"], ["info", "--\x1b[31m\u202e"], ["info", "more\x1b[31m"], ["--\x1b[31m"]):
        assert "x1b" in run(*arguments, code=2)


def test_consoles_and_tables() -> None:
    console = make_console()
    table = Table("name\x1b[1m", title="[red]title[/]\nx")
    for name in EVIL.values():
        table.add_row(name)
    with console.capture() as captured:
        console.print(table)
        console.print(EVIL["markup"] + EVIL["direction"], soft_wrap=True)
    text = captured.get()
    clean(text)
    assert EVIL["markup"] + "\\u202egnp.exe" in text and "[red]title[/]\\nx" in text


def test_every_error_is_one_line() -> None:
    for name in EVIL.values():
        message = str(InputError(f"path: '{name}': is wrong; mend it"))
        clean(message)
        assert "\n" not in message and message.startswith("path: '") and message.endswith("': is wrong; mend it")
    assert len(str(InputError("x" * 10**7))) == LINE


def test_escaped() -> None:
    assert escaped("naïve 日本 \\n [x]") == "naïve 日本 \\n [x]"
    assert escaped("a\nb\x1b\u202e\udc80\U000e0001\xa0") == r"a\nb\x1b\u202e\udc80\U000e0001\xa0"
    assert escaped("0123456789", 5) == "01…89" and len(escaped("\x1b" * 50, 10)) == 10
    assert listed(["x" * 5000, "b"]) == f"'{'x' * 40}…{'x' * 39}', 'b'"


def test_quoted() -> None:
    """Values of files are shown in a few letters, however large, deep or strange."""
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in (
        deep,
        10**10_000,
        list(range(10**6)),
        "x" * 10**7,
        {"x" * 10**6: ["\x1b" * 10**5] * 10**4},
        {1} | {2},
    ):
        clean(quoted(value))
        assert len(quoted(value)) <= 320
    while deep:  # Python frees what is nested so deep by recursion
        deep = deep.pop()
    assert quoted("it's") == '"it\'s"' and quoted([1, None]) == "[1, None]"


def test_a_plain_console_takes_the_tables_of_the_paper() -> None:
    from d2net.report.paper_tables import Comparison, Row, comparison_table, load_table

    run = Row(EVIL["markup"], None, None, EVIL["terminal"], (1.0,) * 7)
    console = Console(width=200)
    with console.capture() as captured:
        console.print(comparison_table(Comparison(load_table("thumos14"), run, False, ())))
    clean(captured.get())
    assert "[bold]x[/bold]" in captured.get()
