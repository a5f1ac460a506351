"""docs/features.md: its example runs, its options are there, and its words are those of the command."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from d2net.cli import app

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "features.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")


def test_an_extractor_of_ones_own(
    tmp_path: Path, make_video: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    image = np.zeros((48, 64, 3), np.uint8)
    image[..., 1] = 255
    make_video("videos/v.mkv", [image] * 40)
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(compile(example, str(DOCUMENT), "exec"), {})
    assert capsys.readouterr().out == "{}\n"
    np.testing.assert_allclose(np.load("features/v.npy"), [[-1, 1, -1]] * 2, atol=1e-6)
    assert json.loads(Path("features/features.json").read_text())["extractor"] == "colours"


def test_its_options_are_those_of_the_command() -> None:
    options = set(re.findall(r"--[a-z][a-z-]+", TEXT)) - {"--no-deps", "--nproc-per-node"}
    assert options <= set(re.findall(r"--[a-z][a-z-]+", CliRunner().invoke(app, ["features", "--help"]).stdout))


def test_its_sensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wrist").mkdir()
    rows = ["time_ms,ax,ay,az,gx,gy,gz", *(f"{20 * i},{i % 7},1,2,3,4,{i % 5}" for i in range(200))]
    Path("wrist/monday.csv").write_text("\n".join(rows))
    (command,) = re.findall(r"^d2net (features wrist.*)$", TEXT, re.MULTILINE)
    assert CliRunner().invoke(app, command.split()).exit_code == 0
    said = json.loads(Path("features/features.json").read_text())
    assert said["streams"] == [48, 48] and said["recordings"]["monday"]["snippets"] == 12
    assert {*re.findall(r"`(\w+)`", TEXT.split("## features.json")[1].split("##")[0])} <= {
        *said,
        *said["recordings"]["monday"],
        "weights",
    }
