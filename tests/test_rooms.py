"""Rooms with one purpose: files stay short and say what they are for, and private names stay where they are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "d2net").rglob("*.py"))
USERS = sorted(path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
LONGEST = 320  # lines of a file

# Each is one operator: its contract, its reference, its kernels and their gradient, which are read side by side.
LONGER = {f"d2net/ops/{name}.py" for name in ("nms", "proposals")}

# What looks at how operators are registered and reach the extension; nothing public could tell.
MACHINERY = {
    "tests/ops/simt.py": "puts the CUDA kernels that run on the CPU in place of the extension's",
    "tests/ops/test_simt.py": "counts the calls that reach them",
    "tests/ops/test_checked.py": "calls every registered operator, public or not, and the extension itself",
    "tests/ops/test_launches.py": "what is said before a first launch on a chip that this machine lacks",
    "tests/test_meta_device.py": "lets tensors without memory take the CUDA functions",
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(source: str) -> Iterator[tuple[str, str]]:
    """(module, name) of each import from d2net; the name is "" where the module itself is imported."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "d2net")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "d2net":
            yield from ((node.module or "", alias.name) for alias in node.names)


def is_module(dotted: str) -> bool:
    path = ROOT / dotted.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def private(source: str, package: str) -> list[str]:
    """Private modules of other packages that a file in ``package`` imports, and private names of any other file."""
    found = []
    for module, name in imported(source):
        dotted = f"{module}.{name}" if name and is_module(f"{module}.{name}") else module
        for i, part in enumerate(dotted.split(".")):
            owner = ".".join(dotted.split(".")[:i])
            if (
                part.startswith("_")
                and part not in ("_C", "__main__")
                and package != owner
                and not package.startswith(f"{owner}.")
            ):
                found.append(dotted)
        if name.startswith("_") and not name.endswith("__") and dotted == module:
            found.append(f"{module}.{name}")
    return found


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_a_file_has_one_purpose(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), "its first line says what it is for"
    lines = text.count("\n")
    assert (lines > LONGEST) == (name_of(path) in LONGER), f"{lines} lines: split it by purpose, or mend LONGER"


def test_private_names_stay_in_their_package() -> None:
    found = {}
    for path in [*PACKAGE, *USERS]:
        if names := private(path.read_text(encoding="utf-8"), ".".join(path.relative_to(ROOT).parts[:-1])):
            found[name_of(path)] = names
    assert found.keys() == MACHINERY.keys(), found


def test_nothing_is_imported_by_the_star() -> None:
    assert not [name_of(path) for path in PACKAGE for _, name in imported(path.read_text("utf-8")) if name == "*"]


@pytest.mark.parametrize(
    ("line", "package", "expected"),
    [
        ("from d2net.ops import _library", "benchmarks", ["d2net.ops._library"]),
        ("from d2net.ops._native import build_info", "d2net", ["d2net.ops._native"]),
        ("import d2net.ops._native", "d2net.losses", ["d2net.ops._native"]),
        ("from d2net.checkpoint import _header", "d2net", ["d2net.checkpoint._header"]),
        ("from d2net.ops import _library", "d2net.ops", []),
        ("from d2net import __version__", "tests", []),
        ("from d2net.ops import topk_pool", "tests", []),
    ],
)
def test_what_is_private(line: str, package: str, expected: list[str]) -> None:
    assert private(line, package) == expected
