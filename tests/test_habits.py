"""Files that no other test runs: hooks, workflows, templates, the citation; and versions that stand twice."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import d2net

ROOT = Path(__file__).parents[1]
GITHUB = sorted((ROOT / ".github").rglob("*.yml"))


def read(path: str | Path) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def test_hooks_have_the_versions_of_the_constraints() -> None:
    hooks = [hook for repo in read(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert {hook["id"] for hook in hooks} == {"ruff-check", "ruff-format", "clang-format", "typos", "mypy"}
    found = dict(each.split("==") for hook in hooks for each in hook.get("additional_dependencies", ()))
    assert found and found.items() <= pins().items()


def test_the_version_stands_in_one_place() -> None:
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", d2net.__version__)
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest and newest[1].strip("[]") == d2net.__version__, "the first heading of CHANGELOG.md"
    assert read("CITATION.cff")["version"] == d2net.__version__
    assert f"pip install 'd2net-{d2net.__version__}-" in (ROOT / "docs/install.md").read_text(encoding="utf-8")


def test_the_citation() -> None:
    cff = read("CITATION.cff")
    paper = cff["preferred-citation"]
    for each in (cff, paper):
        assert each["title"] and each["type"] and all(set(a) <= {"family-names", "given-names", "name"}
                                                      for a in each["authors"])  # fmt: skip
    assert cff["cff-version"] == "1.2.0" and cff["message"] and cff["license"] == "Apache-2.0"
    assert [a["family-names"] for a in paper["authors"]] == ["Narayan", "Cholakkal", "Hayat", "Khan", "Yang", "Shao"]
    assert "2012.06440" in paper["url"] and "2012.06440" in (ROOT / "NOTICE").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", GITHUB, ids=lambda path: path.name)
def test_workflows_and_forms(path: Path) -> None:
    """As far as a reader of YAML can say; GitHub's own words are another matter."""
    content = read(path)
    if path.parent.name == "workflows":
        assert content["permissions"] == {"contents": "read"}
        assert content[True]  # "on", which YAML 1.1 reads as a truth value
        for job in content["jobs"].values():
            assert job["runs-on"] and job["timeout-minutes"]
            for step in job["steps"]:
                assert ("uses" in step) != ("run" in step)
                assert re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}|", step.get("uses", "")), "no hash"
                command = ROOT / step.get("run", ".ci/run").split()[0]
                assert command.is_file() or command.parent.name == "packaging", command
    elif path.name != "config.yml":
        assert content["name"] and content["description"]
        for field in content["body"]:
            assert field["type"] == "textarea" and field["attributes"]["label"]
        assert len({field["id"] for field in content["body"]}) == len(content["body"])


def test_the_sessions_that_contributing_names_are_there() -> None:
    sessions = set(re.findall(r"^@nox\.session\ndef (\w+)", (ROOT / "noxfile.py").read_text(encoding="utf-8"), re.M))
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert sessions == {"setup", "build", "lint", "tests", "native", "docs", "bench"}
    assert set(re.findall(r"nox -s (\w+)", text)) == sessions
    for path in re.findall(r"`((?:tests|docs|csrc|d2net|benchmarks)/[\w./-]+\.\w+)`", text):
        made_up = "scale" in path or "mine" in path
        assert made_up or (ROOT / path).exists(), path


def test_a_source_folder_in_the_way_is_named(tmp_path: Path) -> None:
    """In a clone Python takes d2net from there, before what is installed, and there may be no compiled module."""
    shutil.copytree(ROOT / "d2net", tmp_path / "d2net", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "CMakeLists.txt").touch()
    command = [sys.executable, "-c", "import d2net.ops"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert f"from its source folder {tmp_path}, before any that is installed: run it in another folder" in said.stderr
