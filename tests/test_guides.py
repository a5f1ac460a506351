"""The guides (docs/tutorial.md, own-method.md, migrate.md): every block of code on them is run, on small data."""

from __future__ import annotations

import glob
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import d2net
from d2net.cli import app
from d2net.detections import read_detections

DOCS = Path(__file__).parents[1] / "docs"

pytestmark = pytest.mark.usefixtures("one_thread")


def blocks(page: str) -> Iterator[tuple[str, str, str]]:
    """(heading, language, code) of every block of code of a page, in order."""
    heading, text = "", (DOCS / page).read_text(encoding="utf-8")
    for found in re.finditer(r"^#+ ([^\n]*)$|^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if found[1] is None:
            yield heading, found[2], found[3]
        else:
            heading = found[1]


def run(line: str) -> str:
    """A command as a shell runs it, with patterns of files; what it prints."""
    words = [w for word in shlex.split(line)[1:] for w in (sorted(glob.glob(word)) if "*" in word else [word])]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "120", "D2NET_DEBUG": None})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, f"{line}\n{result.output}"
    return result.output


def execute(page: str, code: str, names: dict[str, Any]) -> None:
    exec(compile(code, f"docs/{page}", "exec"), names)


def test_tutorial(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    printed = {}
    for _, language, code in blocks("tutorial.md"):
        if language == "python":
            execute("tutorial.md", code, names)
        elif language == "sh":
            for line in code.splitlines():
                shorter = line.replace("d2net demo", "d2net demo --iterations 20").replace("=600 ", "=20 ")
                printed[line] = run(shorter)
        else:  # the first lines of a file that a command before it has written
            assert language == "csv"
            written = Path("runs/demo/found.csv").read_text().splitlines()
            assert code.splitlines()[0] == written[0] and written[1].startswith("watch_test_")
    assert "0.6667" in capsys.readouterr().out
    page = re.sub(r"\s+", " ", (DOCS / "tutorial.md").read_text(encoding="utf-8"))
    assert printed["d2net inspect my-data"].rstrip().endswith("nothing suspicious") and '"nothing suspicious"' in page
    (evaluated,) = (text for line, text in printed.items() if line.endswith("detections.json --annotations my-data"))
    table = [float(x) for x in re.findall(r"\d+\.\d", evaluated[evaluated.index("│") : evaluated.index("└")])]
    assert table[4] >= 90 and table[6] < table[4]  # mAP@0.5 and 0.7, as the page says of them
    assert re.search(r"judged: \d+ detections against 12 recordings", evaluated)
    assert Path("runs/mine/report.html").stat().st_size > 100_000 and Path("timeline.png").stat().st_size > 10_000
    assert read_detections("found/detections.csv").videos == ("wrist-36",)


def test_own_method(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    averages = {}
    for heading, language, code in blocks("own-method.md"):
        if heading == "PyTorch Lightning":
            continue  # the next test
        if language == "sh":
            for line in code.splitlines():
                run(line)
        else:
            assert language == "python"
            execute("own-method.md", code, names)
        if heading == "Evaluate, write, report" and language == "python":
            averages["own network"] = names["result"].average
    assert averages["own network"] > 60  # it has learned
    assert names["model"].x_ref.any() and len(names["fewer"]) < len(names["detections"]) and len(names["plain"])
    assert names["own"].videos == names["detections"].videos
    assert {p.name for p in Path().glob("*.*")} >= {"mine.json", "mine.html", "mine.png", "own.json"}
    assert torch.equal(d2net.load_model("runs/own").x_ref, names["network"].x_ref)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in names["model"].parameters())


def test_lightning(tmp_path, monkeypatch):
    pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    wanted = ("Change the method", "Your own network", "Evaluate, write, report", "PyTorch Lightning")
    for heading, language, code in blocks("own-method.md"):
        if heading in wanted and language == "python":
            if heading == "Evaluate, write, report":  # its imports
                code = "\n".join(line for line in code.splitlines() if line.startswith("from "))
            execute("own-method.md", code, names)
    lit = names["trainer"].lightning_module
    assert lit.loss.reference is lit.network.x_ref and lit.network.x_ref.any()
    found = names["localize"](names["network"], names["test"], names["recipe"].localization)
    assert names["evaluate"](found, names["test"].annotations()).average > 60


def test_no_block_is_left_out():
    """Every language of a block is one that a test above runs."""
    for page in ("tutorial.md", "own-method.md"):
        assert {language for _, language, _ in blocks(page)} <= {"python", "sh", "csv"}
        fences = re.findall(r"^ *(?:```|~~~)", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) == 2 * len(list(blocks(page)))
