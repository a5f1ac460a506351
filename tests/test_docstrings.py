"""Docstrings: an Args section has an entry for every parameter, in order, each on a line of its own."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import d2net

SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields|Example):{1,2}")
ENTRY = re.compile(r"(\w+):( |$)")


def section(doc: str, wanted: str) -> list[str]:
    """The lines of a section, without its indentation."""
    lines, within = [], False
    for line in inspect.cleandoc(doc).splitlines():
        if line and not line.startswith(" "):
            found = SECTION.fullmatch(line)
            within = found is not None and found[1] == wanted
        elif within and line:
            lines.append(line[4:])
    return lines


def problems(doc: str, wanted: str, names: list[str] | None) -> list[str]:
    """What is wrong with a section that lists ``names`` (None: any)."""
    lines = section(doc, wanted)
    found = [ENTRY.match(line) for line in lines if not line.startswith(" ")]
    entries = [match[1] if match else "?" for match in found]
    wrong = [f"{wanted}: {entries} instead of {names}"] if names is not None and lines and entries != names else []
    return wrong + [f"{wanted}: a line that is no entry 'name: text'"] * ("?" in entries)


def parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


def documented() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every public function, class and method of d2net, and ``__call__``."""
    for module in pkgutil.walk_packages(d2net.__path__, "d2net."):
        if module.name.rpartition(".")[2] in ("_C", "__main__"):
            continue
        for name, thing in vars(importlib.import_module(module.name)).items():
            if name.startswith("_") or getattr(thing, "__module__", None) != module.name or not callable(thing):
                continue
            yield f"{module.name}.{name}", thing
            for method, function in vars(thing).items() if inspect.isclass(thing) else ():
                function = getattr(function, "__func__", function)
                if inspect.isfunction(function) and (method == "__call__" or not method.startswith("_")):
                    yield f"{module.name}.{name}.{method}", function


def test_every_parameter_has_a_line_of_its_own() -> None:
    seen, wrong = 0, {}
    for name, thing in documented():
        doc = thing.__doc__ or ""
        here = problems(doc, "Attributes", None)
        if section(doc, "Args"):
            seen += 1
            here += problems(doc, "Args", parameters(thing))
        if here:
            wrong[name] = here
    assert seen > 100
    assert not wrong, "\n" + "\n".join(f"{name}: {'; '.join(here)}" for name, here in wrong.items())


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["x: (B, T).", "lengths: (B,), or None:", "    all T."], []),
        (["x: (B, T). lengths: (B,)."], ["['x'] instead of"]),
        (["x, lengths: (B, T)."], ["['?'] instead of", "no entry"]),
        (["lengths: (B,).", "x: (B, T)."], ["['lengths', 'x'] instead of"]),
        (["x: (B, T)."], ["['x'] instead of"]),
    ],
)
def test_what_is_found(lines: list[str], expected: list[str]) -> None:
    doc = "\n        ".join(["What it does.\n\n    Args:", *lines]) + "\n\n    Returns:\n        y.\n"
    found = problems(doc, "Args", ["x", "lengths"])
    assert len(found) == len(expected) and all(part in text for part, text in zip(expected, found, strict=True)), found
