"""The public API: the modules that have ``__all__``, the names in it, and the commands with their options.

``tests/api.txt`` has all of it, a line each, and is compared. ``python tests/test_api.py`` writes it anew.
"""

from __future__ import annotations

import ast
import difflib
import enum
import importlib
import inspect
import pkgutil
import re
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

import d2net
from d2net.cli import app

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).with_name("api.txt")
WHAT_TO_DO = """
The public API is another than in tests/api.txt. What is new: python tests/test_api.py, and a line in CHANGELOG.md.
What is gone or called otherwise: it must go on working for one release, with a DeprecationWarning (CONTRIBUTING.md,
"Versions and deprecations"); a line in CHANGELOG.md says so.
"""
PLAIN = (type(None), bool, int, float, str)


def public_modules() -> dict[str, ModuleType]:
    names = [module.name for module in pkgutil.walk_packages(d2net.__path__, "d2net.")]
    names = [name for name in names if not any(part.startswith("_") for part in name.split("."))]
    modules = {"d2net": d2net, **{name: importlib.import_module(name) for name in names}}
    return {name: module for name, module in sorted(modules.items()) if "__all__" in vars(module)}


# --- Lines ------------------------------------------------------------------------------------------------------------
# No repr of an annotation or of an object: Python's versions write them in different ways.


def annotation(of: Any) -> str:
    if isinstance(of, typing.ForwardRef):
        of = of.__forward_arg__
    return of if isinstance(of, str) else getattr(of, "__qualname__", "...")


def is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list, set, frozenset)):
        return all(is_plain(each) for each in value)
    return isinstance(value, PLAIN) and not isinstance(value, enum.Enum)


def plain(value: Any) -> str:
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(sorted(map(repr, value))) + "}"
    return repr(value) if is_plain(value) else getattr(value, "__name__", "...")


def parameter(p: inspect.Parameter) -> str:
    stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
    said = "" if p.annotation is p.empty else f": {annotation(p.annotation)}"
    return f"{stars}{p.name}{said}" + ("" if p.default is p.empty else f" = {plain(p.default)}")


def signature(function: Any) -> str:
    found = inspect.signature(function)
    parts, named = [], False
    for p in found.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not named:
            parts.append("*")
        named = named or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        parts.append(parameter(p))
    returned = found.return_annotation
    said = "" if inspect.isclass(function) or returned is found.empty else f" -> {annotation(returned)}"
    return f"({', '.join(parts)}){said}"


def members(of: type) -> Iterator[str]:
    """Public methods, properties and members of an enumeration, inherited ones of d2net's too."""
    ours = [each for each in of.__mro__ if each.__module__.split(".")[0] == "d2net"]
    names = {name: value for each in reversed(ours) for name, value in vars(each).items()}
    for name, value in sorted(names.items()):
        if name.startswith("_") and name != "__call__":
            continue
        if isinstance(value, property):
            yield f".{name}: {annotation(inspect.signature(value.fget).return_annotation)}"
        elif inspect.isfunction(getattr(value, "__func__", value)):
            yield f".{name}{signature(getattr(value, '__func__', value))}"
        elif isinstance(value, of) and isinstance(value, enum.Enum):
            yield f".{name} = {plain(value.value)}"


def fields(of: type) -> str:
    """The arguments that make one: of a NamedTuple its fields, whose own signature differs between Pythons."""
    if not issubclass(of, tuple):
        return signature(of)
    types, defaults = of.__annotations__, of._field_defaults
    said = [f"{x}: {annotation(types[x])}" + (f" = {plain(defaults[x])}" if x in defaults else "") for x in of._fields]
    return f"({', '.join(said)})"


def lines_of(name: str, value: Any) -> Iterator[str]:
    if inspect.isclass(value):
        yield f"class {name}" + ("" if issubclass(value, (enum.Enum, Exception)) else fields(value))
        yield from (f"  {line}" for line in members(value))
    elif inspect.isfunction(value):
        yield f"{name}{signature(value)}"
    elif typing.get_origin(value) is typing.Literal:
        yield f"{name} = Literal[{', '.join(map(repr, typing.get_args(value)))}]"
    elif typing.get_origin(value) is not None:
        yield f"{name}: a type"
    else:
        yield f"{name} = {plain(value)}"


def command_lines(command: Any = None, words: str = "d2net") -> Iterator[str]:
    command = command or typer.main.get_command(app)
    yield words
    for p in command.params:
        named = p.opts[0].startswith("-")
        what = "/".join((*p.opts, *p.secondary_opts)) if named else f"{p.name.upper()}"
        default = "" if p.required or (p.default is None and p.multiple) else f" = {plain(p.default)}"
        yield f"  {what}{' ...' * p.multiple}{default}{' (required)' * p.required}"
    for name, each in getattr(command, "commands", {}).items():
        yield from command_lines(each, f"{words} {name}")


def api() -> str:
    """What ``tests/api.txt`` holds."""
    lines, seen = [], {}
    for module_name, module in public_modules().items():
        lines.append(f"\n# {module_name}")
        for name in sorted(module.__all__):
            value = getattr(module, name)
            if (inspect.isclass(value) or inspect.isfunction(value)) and value in seen:
                lines.append(f"{name}: {seen[value]}")
                continue
            if inspect.isclass(value) or inspect.isfunction(value):
                seen[value] = f"{module_name}.{name}"
            lines += lines_of(name, value)
    return "\n".join(["# Written by: python tests/test_api.py", *lines, "\n# Commands", *command_lines()]) + "\n"


# --- Tests ------------------------------------------------------------------------------------------------------------


def test_the_public_api_is_as_listed() -> None:
    then, now = FILE.read_text(encoding="utf-8").splitlines(), api().splitlines()
    changes = difflib.unified_diff(then, now, "listed", "found", lineterm="", n=0)
    assert then == now, "\n".join([WHAT_TO_DO, *changes])


@pytest.mark.parametrize("name", public_modules())
def test_public_names_exist_and_say_what_they_are(name: str) -> None:
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    for each in module.__all__:
        value = getattr(module, each)
        assert not (inspect.isclass(value) or inspect.isfunction(value)) or inspect.getdoc(value), each


def test_pages_use_public_names_alone() -> None:
    modules, unlisted, seen = public_modules(), [], 0
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for block in re.findall(r"```python\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.DOTALL | re.M):
            for node in ast.walk(ast.parse(textwrap.dedent(block))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "d2net":
                    seen += 1
                    listed = getattr(modules.get(node.module), "__all__", ())
                    names = [alias.name for alias in node.names]
                    wrong = [x for x in names if x not in listed and f"{node.module}.{x}" not in modules]
                    unlisted += [f"{page.relative_to(ROOT)}: {node.module}.{x}" for x in wrong]
    assert seen > 10 and not unlisted, unlisted


def test_the_reference_is_of_public_modules() -> None:
    modules = public_modules()
    for page in (ROOT / "docs").rglob("*.md"):
        for name in re.findall(r"^::: (d2net[\w.]*)", page.read_text(encoding="utf-8"), re.MULTILINE):
            owner, _, member = name.rpartition(".")
            private = name not in modules and not any(member in x.__all__ for x in modules.values())
            assert not private, f"{page.relative_to(ROOT)}: {name} is not public: give {owner} an __all__"


def test_signatures() -> None:
    def function(a, b: int = 1, *rest: str, c: float | None = None, d=len, **more) -> list[str]: ...

    expected = "(a, b: int = 1, *rest: str, c: float | None = None, d = len, **more) -> list[str]"
    assert signature(function) == expected
    assert signature(lambda x, *, y=(1, "z"): x) == "(x, *, y = (1, 'z'))"


if __name__ == "__main__":
    FILE.write_text(api(), encoding="utf-8")
