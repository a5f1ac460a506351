"""The documentation site builds strictly, has every public name and command, and asks no other host for anything."""

from __future__ import annotations

import functools
import http.server
import importlib
import inspect
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import typer

import d2net
from d2net import equations
from d2net.cli import app

ROOT = Path(__file__).parents[1]

MODULES = [module.name for module in pkgutil.walk_packages(d2net.__path__, "d2net.")]
MODULES = ["d2net", *(name for name in MODULES if not any(part.startswith("_") for part in name.split(".")))]
PUBLIC = [name for name in MODULES if hasattr(importlib.import_module(name), "__all__")]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install '.[docs]'")
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install '.[docs]'")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: pip install '.[docs]'")
    out = tmp_path_factory.mktemp("site")
    environment = {k: v for k, v in os.environ.items() if k not in ("D2NET_REPOSITORY", "D2NET_SITE")}
    path = [str(Path(d2net.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
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


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_reference(site, module):
    named = set().union(*map(headings, (site / "paper.html", *(site / "reference").glob("*.html"))))
    public = importlib.import_module(module).__all__
    # Where a file is called as what is in it, its name is the file's.
    assert not [name for name in public if not {f"{module}.{name}", f"{module}.{name}.{name}"} & named]


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


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_a_browser_reads_and_searches_it_without_a_network(site):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no browser: apt-get install chromium")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root, asked, errors = f"http://127.0.0.1:{server.server_port}/", [], []
    try:
        with (
            playwright.sync_playwright() as p,
            p.chromium.launch(executable_path=path, args=["--no-sandbox"]) as browser,
        ):
            page = browser.new_page(viewport={"width": 390, "height": 844})
            page.on("request", lambda request: asked.append(request.url))
            page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
            for name in ("paper.html", "studies.html", "reference/settings.html", "index.html"):
                page.goto(root + name)
                assert page.evaluate("document.documentElement.scrollWidth") == 390  # wide tables scroll by themselves
            page.set_viewport_size({"width": 1280, "height": 900})
            page.fill("input.md-search__input", "joint_log_condition_number")
            page.wait_for_selector(".md-search-result__link[href*='reference/ops']", state="attached", timeout=20_000)
    finally:
        server.shutdown()
    assert len(asked) > 10 and all(url.startswith((root, "data:", "blob:")) for url in asked) and not errors
