"""The attackers of this folder, each as a person runs it; docs/reliability.md says what they do and what they found."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def attack(script: str, *options: object, figures: Path) -> dict:
    """What a script found, which it writes to ``figures``; in a process that has started no thread, since it forks."""
    package = importlib.util.find_spec("d2net")
    place = str(Path(package.origin).parents[1])
    command = [sys.executable, HERE / script, *options, "--json", figures]
    environment = {**os.environ, "PYTHONPATH": place}
    ended = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, f"{ended.stdout[-6000:]}\n{ended.stderr[-2000:]}"
    return json.loads(figures.read_text())


@pytest.mark.slow
def test_kills_and_full_disks_lose_nothing(tmp_path):
    found = attack("kills.py", "--number", 100, figures=tmp_path / "kills.json")
    assert found["problems"] == [] and len(found["attacks"]) == 6


@pytest.mark.slow
def test_damaged_files_end_in_one_line_or_the_same_result(tmp_path):
    found = attack("corpus.py", "--number", 60, figures=tmp_path / "corpus.json")
    assert found["problems"] == [] and sum(found["total"].values()) >= 1000


@pytest.mark.slow
def test_operators_equal_their_references_and_refuse_the_rest(tmp_path):
    found = attack("operators.py", "--number", 20_000, figures=tmp_path / "operators.json")
    assert found["problems"] == [] and sum(found["calls"].values()) == 20_000


def test_the_page_has_the_figures_of_the_stored_results():
    spec = importlib.util.spec_from_file_location("tables", HERE / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    _, shown, _ = tables.split(tables.PAGE.read_text(encoding="utf-8"))
    assert shown == tables.figures()


def test_some_calls_of_operators(tmp_path):
    found = attack("operators.py", "--number", 320, "--seed", 1, figures=tmp_path / "operators.json")
    assert found["problems"] == [] and sum(found["calls"].values()) == 320
