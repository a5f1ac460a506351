"""The documentation site builds strictly, has every public name and command, and asks no other host for anything."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import d2net
from d2net import equations
from d2net.cli import app

ROOT = Path(__file__).parents[1]

# The page of each module whose __all__ is the public API.
PAGES = {
    "d2net": "d2net",
    "d2net.report.page": "report",
    "d2net.studies.ablation": "studies",
    **{
        f"d2net.{name}": name
        for name in (
            *("data", "evaluation", "features", "localization", "losses", "ops", "prediction", "recipes", "report"),
            "training",
        )
    },
}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install '.[docs]'")
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install '.[docs]'")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: pip install '.[docs]'")
    out = tmp_path_factory.mktemp("site")
    environment = {k: v for k, v in os.environ.items() if k not in ("D2NET_REPOSITORY", "D2NET_SITE")}
    path = [str(Path(d2net.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": os.pathsep.join(path), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def headings(page: Path) -> set[str]:
    return set(re.findall(r'<h\d id="([^"]+)"', page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("module", PAGES)
def test_every_public_name_is_in_the_reference(site, module):
    named = {name.rpartition(".")[2] for name in headings(site / "reference" / f"{PAGES[module]}.html")}
    assert not set(importlib.import_module(module).__all__) - named


def test_every_command_and_setting(site):
    commands = headings(site / "reference" / "commands.html")
    assert {f"d2net-{name}" for name in typer.main.get_command(app).commands} <= commands
    text = (site / "reference" / "settings.html").read_text(encoding="utf-8")
    assert "loss.alpha_snippet" in text and "<code>activitynet12-paper</code>" in text


def test_the_paper_has_every_equation_as_text_and_as_code(site):
    text = (site / "paper.html").read_text(encoding="utf-8")
    functions = {name for name, thing in vars(equations).items() if inspect.isfunction(thing)}
    assert {f"d2net.equations.{name}" for name in functions} <= headings(site / "paper.html")
    assert text.count('<details class="mkdocstrings-source" open>') == len(functions)
    assert "Eq. 2: x_fg = sum over" in text and '"""' not in text


def test_no_role_of_sphinx_is_left(site):
    role = re.compile(r":(?:attr|class|data|func|meth|mod):")
    assert not [page.name for page in site.rglob("*.html") if role.search(page.read_text(encoding="utf-8"))]


def test_nothing_is_asked_of_another_host(site):
    """Links may lead elsewhere; what a browser loads by itself may not."""
    loads = re.compile(r'<(?:script|img|iframe|source)\b[^>]*\bsrc="(?:https?:)?//|<link\b[^>]*\bhref="(?:https?:)?//')
    assert not [page.name for page in site.rglob("*.html") if loads.search(page.read_text(encoding="utf-8"))]
    styles = re.compile(r"(?:url\(|@import )['\"]?(?:https?:)?//")
    assert not [page.name for page in site.rglob("*.css") if styles.search(page.read_text(encoding="utf-8"))]


def test_links_out_of_the_docs_name_the_file_where_there_is_no_address(site):
    text = (site / "gpu.html").read_text(encoding="utf-8")
    assert "benchmarks/results/h100" in text and 'href="../' not in text
    assert 'href="contributing.html"' in (site / "index.html").read_text(encoding="utf-8")
