"""What the site has beside the files of docs/: pages that are made of other files, and of the code."""

from __future__ import annotations

import posixpath
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from d2net.recipes import load_recipe, recipe_names
from d2net.recipes.recipe import SECTIONS

ROOT = Path(__file__).parents[2]
FROM_ROOT = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md"}
CODE_OR_LINK = re.compile(r"```.*?```|`[^`]*`|(?<!!)\[([^\]]+)\]\(([^)\s#]+)(#[^)]*)?\)", re.DOTALL)
log = get_plugin_logger("pages")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, source in FROM_ROOT.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "reference/commands.md", content=commands()))
    files.append(File.generated(config, "reference/settings.md", content=settings()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are in the repository: to a page of the site, or out of it."""
    here = page.file.src_uri
    folder = posixpath.dirname(FROM_ROOT.get(here, f"docs/{here}"))
    pages = {f"docs/{file.src_uri}": file.src_uri for file in files}
    pages |= {source: name for name, source in FROM_ROOT.items()}

    def link(found: re.Match[str]) -> str:
        text, path, anchor = found.groups()
        if path is None or ":" in path:  # code, or an address
            return found[0]
        target = posixpath.normpath(posixpath.join(folder, path))
        if target in pages:
            return f"[{text}]({posixpath.relpath(pages[target], posixpath.dirname(here) or '.')}{anchor or ''})"
        if not (ROOT / target).exists():
            log.warning("%s: there is no file %s", here, path)
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/HEAD/{target}{anchor or ''})"
        return text if target in text else f"{text} (`{target}`)"

    return CODE_OR_LINK.sub(link, markdown)


def on_page_content(html: str, page: Page, **_: Any) -> str | None:
    """On the paper's page the code stands open, without the docstrings, which stand above it as text."""
    if page.file.src_uri != "paper.md":
        return None
    html = re.sub(r'<span class="w"> *</span><span class="sd">.*?"""</span>\n', "", html, flags=re.DOTALL)
    return html.replace('<details class="mkdocstrings-source">', '<details class="mkdocstrings-source" open>')


def commands() -> str:
    """The help of every command, by Typer's own writer of documents."""
    typer = [sys.executable, "-m", "typer", "d2net.cli", "utils", "docs", "--name", "d2net", "--title", "Commands"]
    text = subprocess.run(typer, cwd=ROOT, check=True, capture_output=True, encoding="utf-8").stdout
    text = re.sub(r"^\*\*Commands\*\*:\n\n(?:\* .*\n)+", "", text, flags=re.MULTILINE)  # cut short; they follow in full
    return re.sub(r"^(Examples?:)\n((?:  .+\n)+)", r"\1\n\n```sh\n\2```\n", text, flags=re.MULTILINE)


def settings() -> str:
    """Every setting, from where the code has it, and the recipes in which it is another."""
    recipes = {name: load_recipe(name) for name in recipe_names()}
    lines = [
        "# Settings of a recipe",
        "`d2net train --recipe NAME` takes a recipe, `--set SECTION.KEY=VALUE` changes a setting, and "
        "`d2net recipes NAME > mine.yaml` writes a recipe as a file to change. The defaults are the paper's for "
        "THUMOS14.",
    ]
    for section, made in SECTIONS.items():
        lines += [f"## {section}", made.__doc__, "| setting | default | elsewhere | meaning |\n|---|---|---|---|"]
        for field in fields(made):
            elsewhere: dict[str, list[str]] = {}
            for name, recipe in recipes.items():
                value = getattr(getattr(recipe, section), field.name)
                if value != field.default:
                    elsewhere.setdefault(_value(value), []).append(f"`{name}`")
            others = "; ".join(f"{value} in {', '.join(names)}" for value, names in elsewhere.items())
            meaning = field.metadata["meaning"].replace("|", "\\|")
            lines[-1] += f"\n| `{section}.{field.name}` | {_value(field.default)} | {others} | {meaning} |"
    return "\n\n".join(lines)


def _value(value: Any) -> str:
    """As a recipe's file has it; a long list by its ends."""
    if isinstance(value, tuple):
        return f"[{value[0]:g}, {value[1]:g}, …, {value[-1]:g}]"
    return "null" if value is None else str(value).lower()
